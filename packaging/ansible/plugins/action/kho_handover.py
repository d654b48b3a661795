# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kho_handover runs on the controller: a module would end with the kernel it runs in."""

from __future__ import annotations

import getpass
import random
import socket
import time

from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.common.text.converters import to_native
from ansible.plugins.action import ActionBase

from ansible_collections.khod.kho.plugins.module_utils.outcome import (
    GOOD,
    describe_outcome,
    judge_handover,
    list_past_blackouts,
)
from ansible_collections.khod.kho.plugins.plugin_utils.connection import (
    HOST_KEY,
    execute_module,
    keep_asking,
    prepare_connection,
    reset_connection,
)

MAX_PAUSE = 5.0
"""The longest pause between two looks at the host, in seconds."""
SENTENCES = {
    "verified": "The handover arrived and was verified.",
    "unchanged": "The host runs the target, and the handover into it was verified.",
    "degraded": "The host is in the next kernel, but the verification found something.",
    "over_budget": "The handover was verified, but its blackout was over the budget.",
    "cold_boot": "The host booted cold: no state arrived.",
    "refused": "The handover was refused; the host goes on in its kernel.",
    "rolled_back": "The handover was rolled back; the host goes on in its kernel.",
    "not_rolled_back": "The handover failed, and not everything could be undone.",
    "never_came_back": "The host did not come back before the deadline.",
    "still_under_way": "The handover had not ended at the deadline; it continues on the host.",
}
ARGUMENTS = {
    "profile": {"type": "str", "required": True},
    "rollout": {"type": "str"},
    "timeout": {"type": "float", "default": 900.0},
    "connect_timeout": {"type": "float", "default": 0.0},
    "blackout_budget": {"type": "float"},
    "report": {"type": "bool", "default": True},
    "directory": {"type": "path", "default": "/var/lib/khod-ansible"},
}


class ActionModule(ActionBase):
    """Begin a handover, wait through the jump, and return what it came to, with its proof."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        del tmp
        self._task_vars = task_vars
        self._diff = {}
        dummy, self._args = self.validate_argument_spec(argument_spec=ARGUMENTS)
        prepare_connection(self._connection)
        facts = self._keep_asking(self._read_facts)
        if not facts["available"]:
            if facts.get("reachable") is False:
                return self._fail("refused", "khod cannot be asked: %s" % facts["reason"])
            return {"skipped": True, "changed": False, "outcome": "no_kho", "reason": facts["reason"]}
        claim = self._keep_asking(self._read_claim)
        if claim.get("state") == "finished":
            result = claim["result"] | {"changed": False, "past_blackouts": []}
            return result if result["outcome"] in GOOD else self._fail(result["outcome"], result["reason"], result)
        if claim.get("state") != "begun":
            ended = self._check_plan(facts)
            if ended is not None:
                return ended
            try:
                begun = self._ask("kho_claim", state="begun", **self._claim_arguments())
            except AnsibleConnectionFailure:  # only the answer is lost, or the host is
                begun = {"claim": {"boot_id": facts["boot_id"], "runs": [one["run"] for one in facts["history"]]}}
            if begun.get("failed"):
                return self._fail(begun.get("outcome", "refused"), begun.get("msg", "The handover did not begin."))
            claim = begun["claim"]
        return self._wait_for_end(claim)

    def _check_plan(self, facts):
        """Return the result where nothing is to be begun: there already, refused, or check mode; None otherwise."""
        checked = self._ask("kho_check", profile=self._args["profile"])
        common = {key: checked[key] for key in ("diff", "plan", "checks") if key in checked}
        if checked.get("skipped"):
            return {"skipped": True, "changed": False, "outcome": "no_kho", "reason": checked["reason"]}
        if checked.get("failed"):
            return self._fail("refused", checked.get("msg", "The plan cannot be made."), common)
        if not checked["needed"]:
            attempt = next((one for one in facts["history"] if one["run"] == facts["run"]), None)
            found = describe_outcome("unchanged", attempt, facts)
            return self._conclude(found, facts, changed=False)
        if self._task.check_mode:
            return {"changed": True, "outcome": "planned", "reason": checked["reason"], **common}
        self._diff = {"diff": checked["diff"]}
        return None

    def _wait_for_end(self, claim):
        """Look at the host until the handover that `claim` began has ended, or the deadline is over."""
        ends, pause, error, facts = time.monotonic() + self._args["timeout"], 1.0, "", None
        idle = 0
        while time.monotonic() < ends:
            try:
                facts, error = self._read_facts(), ""
            except AnsibleConnectionFailure as lost:
                facts, error = None, to_native(lost).strip()
                if any(text in error for text in HOST_KEY):
                    return self._fail("never_came_back", "%s ssh: %s" % (SENTENCES["never_came_back"], error))
                reset_connection(self._connection)
            found = None if facts is None or "boot_id" not in facts else self._judge(facts, claim)
            # What is not the proof of an arrival is believed when it was seen twice: khod may just be starting.
            idle = idle + 1 if found else 0
            if found and (found["outcome"] in ("verified", "degraded") or idle > 1):
                return self._conclude(found, facts, changed=True)
            time.sleep(min(pause + random.random() / 2, max(0.0, ends - time.monotonic())))
            pause = min(pause * 1.5, MAX_PAUSE)
        outcome = "still_under_way" if facts is not None and "boot_id" in facts else "never_came_back"
        reason = error or (facts or {}).get("reason", "") or (facts or {}).get("summary", "")
        message = "%s (%g s) %s" % (SENTENCES[outcome], self._args["timeout"], reason)
        return self._fail(outcome, message, {"changed": True})

    @staticmethod
    def _judge(facts, claim):
        return judge_handover(facts, claim["boot_id"], claim["runs"]) if facts["boot_id"] else None

    def _conclude(self, found, facts, changed):
        """Return the result of the task for an outcome."""
        budget, blackout = self._args["blackout_budget"], found["blackout_seconds"]
        if found["outcome"] in GOOD and changed and budget is not None and blackout is not None and blackout > budget:
            found["outcome"] = "over_budget"
            found["reason"] = "The blackout was %.3f s, the budget is %g s." % (blackout, budget)
        past = list_past_blackouts(facts["history"], found["run"])
        result = found | self._diff | {"changed": changed, "past_blackouts": past}
        if self._args["report"] and found["run"]:
            report = self._ask("kho_report", run=found["run"])
            result["report"] = report.get("report")
        if found["outcome"] in GOOD:
            return result | {"msg": SENTENCES[found["outcome"]]}
        return self._fail(found["outcome"], "%s %s" % (SENTENCES[found["outcome"]], found["reason"]), result)

    @staticmethod
    def _fail(outcome, message, found=None):
        """Return the result of a task that fails with an outcome; `found` is what is known beside it."""
        result = {"changed": False, "reason": message.strip()} | (found or {})
        return result | {"failed": True, "outcome": outcome, "msg": message.strip()}

    # -- the host ---------------------------------------------------------------------------------------------------

    def _ask(self, name, **arguments):
        return execute_module(self, name, arguments, self._task_vars)

    def _keep_asking(self, ask):
        return keep_asking(ask, self._connection, self._args["connect_timeout"])

    def _read_facts(self):
        found = self._ask("kho_facts", profile=self._args["profile"])
        if "ansible_facts" not in found:
            raise AnsibleConnectionFailure(found.get("module_stderr") or found.get("msg") or "no answer")
        return found["ansible_facts"]["kho"]

    def _read_claim(self):
        """Return the claim of this roll-out; {} without one."""
        if self._args["rollout"] is None or self._task.check_mode:
            return {}
        held = self._ask("kho_claim", state="held", **self._claim_arguments())
        return {} if held.get("failed") else held["claim"]

    def _claim_arguments(self):
        return {
            "rollout": self._args["rollout"],
            "profile": self._args["profile"],
            "directory": self._args["directory"],
            "owner": "%s on %s" % (getpass.getuser(), socket.gethostname()),
        }
