#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_check
short_description: Check whether a handover by a profile could begin, and touch nothing
description:
  - Runs the preflight checks of C(khoctl check) with the next kernel of a profile. Nothing is changed.
  - In check mode RV(plan) has every step with its undo as well, and RV(ignore:changed) says whether
    M(khod.kho.kho_handover) would begin a handover.
  - In diff mode the diff has the command line, one word a line, and the release of both kernels.
options:
  profile:
    description: The name of the profile, a file of C(/etc/kho/handover.d) without its C(.toml).
    type: str
    required: true
  fail:
    description: Whether a check that fails makes the task fail. Otherwise RV(refused) says so.
    type: bool
    default: true
author:
  - The khod authors (@khod)
extends_documentation_fragment:
  - action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  platform:
    platforms: linux
"""

EXAMPLES = r"""
- name: Stop here if the handover would be refused
  khod.kho.kho_check:
    profile: weekly

- name: Print the plan and what changes on the command line
  khod.kho.kho_check:
    profile: weekly
  check_mode: true
  diff: true
"""

RETURN = r"""
needed:
  description: Whether the host is not yet in the target of the profile, verified.
  returned: when KHO is available
  type: bool
reason:
  description: Why a handover is needed; why KHO is not available; empty otherwise.
  returned: always
  type: str
refused:
  description: Whether a handover would be refused.
  returned: when KHO is available
  type: bool
checks:
  description: Each check with its result, evidence and remedy.
  returned: when KHO is available
  type: list
  elements: dict
release:
  description: The release of the next kernel.
  returned: when KHO is available
  type: str
plan:
  description: The plan as C(khoctl plan --json) has it.
  returned: in check mode
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.khod.kho.plugins.module_utils.khoctl import Khoctl
from ansible_collections.khod.kho.plugins.module_utils.outcome import find_reason_to_begin

REFUSED = 3
UNSUPPORTED = 4


def main():
    """Make the plan, and say what it means."""
    module = AnsibleModule(
        argument_spec={
            "profile": {"type": "str", "required": True},
            "fail": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    khoctl, profile = Khoctl(module), module.params["profile"]
    facts = khoctl.read_facts()
    if facts.get("reachable") is False:
        module.fail_json(msg="khod cannot be asked: %s" % facts["reason"], outcome="refused", reason=facts["reason"])
    if not facts["available"]:
        module.exit_json(skipped=True, changed=False, outcome="no_kho", reason=facts["reason"])
    code, plan, err = khoctl.ask("plan", "--profile", profile)
    if code == UNSUPPORTED:
        module.exit_json(skipped=True, changed=False, outcome="no_kho", reason=err)
    if plan is None or "checks" not in plan:
        module.fail_json(msg="There is no plan for profile %s: %s" % (profile, err), outcome="refused", reason=err)
    attempt = khoctl.ask("history", "show", facts["run"])[1] if facts["run"] else None
    reason = find_reason_to_begin(facts, attempt, plan)
    result = {
        "changed": bool(reason) and module.check_mode,
        "needed": bool(reason),
        "reason": reason,
        "refused": code == REFUSED,
        "checks": plan["checks"],
        "release": plan["release"],
        "diff": describe_diff(facts, plan),
    }
    if module.check_mode:
        result["plan"] = plan
    if code == REFUSED and reason and module.params["fail"]:
        module.fail_json(msg="A handover would be refused. %s" % describe_failed(plan), outcome="refused", **result)
    module.exit_json(**result)


def describe_failed(plan):
    """Return the checks that fail, with evidence and remedy."""
    failed = [one for one in plan["checks"] if one["result"] == "fail"]
    return " ".join(("%(name)s: %(evidence)s. %(remedy)s" % one).strip() for one in failed)


def describe_diff(facts, plan):
    """Return both kernels and their command lines, one word a line."""
    before = [word["text"] for word in plan["words"] if word["fate"] != "added"]
    after = [word["text"] for word in plan["words"] if word["fate"] in ("kept", "added")]
    return {
        "before_header": "running kernel",
        "after_header": "next kernel",
        "before": "\n".join(["kernel %s" % facts["kernel"], *before, ""]),
        "after": "\n".join(["kernel %s" % (plan["release"] or "unknown"), *after, ""]),
    }


if __name__ == "__main__":
    main()
