# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kho_conclude runs on the controller: it turns what a host came to into the exit code of ansible-playbook."""

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ansible_collections.khod.kho.plugins.module_utils.outcome import GOOD

ARGUMENTS = {"result": {"type": "dict", "required": True}}


class ActionModule(ActionBase):
    """End the play of a host with its outcome."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        del tmp
        dummy, given = self.validate_argument_spec(argument_spec=ARGUMENTS)
        outcome = given["result"].get("outcome", "not_touched")
        message = ("%s. %s" % (outcome, given["result"].get("reason") or "")).strip()
        if outcome in GOOD or outcome == "planned":
            return {"changed": False, "outcome": outcome}
        if outcome in ("no_kho", "not_touched"):
            return {"unreachable": True, "outcome": outcome, "msg": "Skipped: %s" % message}
        return {"failed": True, "outcome": outcome, "msg": message}
