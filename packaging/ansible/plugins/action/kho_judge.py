# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kho_judge runs on the controller: it only reads what the hosts of a batch came to."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.khod.kho.plugins.module_utils.summary import (
    NOT_REACHED,
    describe_judgement,
    draw_table,
    find_reasons_to_stop,
    judge_blackouts,
)

DISPLAY = Display()
ARGUMENTS = {
    "batch": {"type": "list", "elements": "str", "required": True},
    "hosts": {"type": "list", "elements": "str", "required": True},
    "alpha": {"type": "float", "default": 0.01},
    "margin": {"type": "float", "default": 0.0},
    "go_on_after": {"type": "list", "elements": "str", "default": []},
    "show_table": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):
    """Judge a batch; the task fails where the roll-out must stop."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        del tmp
        dummy, given = self.validate_argument_spec(argument_spec=ARGUMENTS)
        if not 0 <= given["alpha"] <= 0.01:
            return {"failed": True, "msg": "alpha is %g: it is 0.01 at most, and 0 for no test." % given["alpha"]}
        known = {host: self._find_result(task_vars["hostvars"], host) for host in given["hosts"]}
        batch = {host: known[host] for host in given["batch"] if known[host] is not NOT_REACHED}
        batch |= {host: result for host, result in known.items() if result["outcome"] == "lost"}
        reasons = find_reasons_to_stop(batch, given["go_on_after"])
        judged = None
        if given["alpha"] > 0 and batch:
            judged = judge_blackouts(batch, len(given["batch"]) / len(given["hosts"]), given["alpha"], given["margin"])
            if any(result["outcome"] == "verified" for result in batch.values()):
                DISPLAY.display(describe_judgement(judged))
            if judged["worse"]:
                reasons.append(describe_judgement(judged))
        if reasons or given["show_table"]:
            DISPLAY.display("\n".join(draw_table(known)))
        result = {"changed": False, "judgement": judged, "reasons": reasons, "table": draw_table(known)}
        if reasons:
            result |= {"failed": True, "msg": "The roll-out stops here. %s" % " ".join(reasons)}
        return result

    @staticmethod
    def _find_result(hostvars, host):
        """Return what a host came to; one that was claimed, and then not reached any more, is lost."""
        facts = hostvars[host]
        if "rolling_result" in facts:
            return dict(facts["rolling_result"])
        if (facts.get("rolling_claim") or {}).get("claim", {}).get("state") in ("held", "begun"):
            return {"outcome": "lost", "reason": "The connection was lost after the host was claimed."}
        return NOT_REACHED
