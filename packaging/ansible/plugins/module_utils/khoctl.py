# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's own programs, as its modules ask them: khoctl and systemctl. Everything comes from their JSON."""

from __future__ import annotations

import json

from ansible.module_utils.common.text.converters import to_native

HISTORY = 21
"""How many attempts are read: the last one, and as many before it as the test of a batch uses of one host."""
NOT_REACHABLE = 5
WITHOUT_KHO = "This host does not offer KHO: khoctl check"


class Khoctl:
    """khoctl and systemctl of this host."""

    def __init__(self, module):
        self._module = module
        self._path = module.get_bin_path("khoctl")

    @property
    def is_installed(self):
        """Whether there is a khoctl."""
        return self._path is not None

    def ask(self, *words):
        """Run khoctl with `--json`; its exit code, what it printed as an object (None without), and its errors."""
        code, out, err = self._module.run_command([self._path, *words, "--json"])
        lines = [line for line in out.splitlines() if line.strip()]
        try:
            found = json.loads(lines[-1]) if lines else None
        except ValueError:
            found = None
        return code, found, to_native(err).strip()

    def read_unit(self, profile):
        """Return what systemd says of the unit that runs a profile."""
        names = ("ActiveState", "ExecMainStatus", "Result", "Job")
        code, out, err = self._module.run_command(
            ["systemctl", "show", "--property=%s" % ",".join(names), unit_of(profile)]
        )
        if code:
            self._module.fail_json(msg="systemctl cannot be asked: %s" % err.strip())
        found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
        return {
            "active": found.get("ActiveState", ""),
            "exit_status": int(found.get("ExecMainStatus") or 0),
            "result": found.get("Result", ""),
            "job": int(found.get("Job") or 0),
        }

    def start_unit(self, profile):
        """Have systemd run a profile, and return at once; "" or why it does not. khod is told who asks."""
        code, dummy, err = self._module.run_command([self._path, "handover", profile, "--yes", "--no-block"])
        return err.strip() or "exit status %d" % code if code else ""

    def read_facts(self, profile=None):
        """Return the facts of this host. They are the whole of what an outcome is judged by."""
        facts = {"available": False, "installed": self.is_installed, "reason": "", "history": []}
        if not self.is_installed:
            return facts | {"reason": "khoctl is not installed"}
        code, status, err = self.ask("status")
        if status is None or "phase" not in status:
            return facts | {"reason": err or "khoctl status answered nothing", "reachable": code != NOT_REACHABLE}
        dummy, listed, dummy = self.ask("history", "-n", str(HISTORY))
        taken = ("phase", "outcome", "run", "generation", "verdict", "summary", "remedy", "boot_id", "last_error")
        facts |= {key: status[key] for key in taken}
        facts |= {
            "reachable": True,
            "available": status["generation"] != "none",
            "kernel": status["kernel_release"],
            "begun": status.get("begun"),
            "blackout_seconds": status["blackout_seconds"],
            "blackout_error_seconds": status["blackout_error_seconds"],
            "history": (listed or {}).get("attempts", []),
        }
        if not facts["available"]:
            facts["reason"] = status["summary"] or WITHOUT_KHO
        if profile is not None:
            facts["unit"] = self.read_unit(profile)
        return facts


def unit_of(profile):
    """Return the unit that runs a profile."""
    return "kho-handover@%s.service" % profile
