#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_report
short_description: Read the report of one attempt at a handover
description:
  - Reads all that is known of an attempt, as C(khoctl report --json) has it.
options:
  run:
    description: The run, or the beginning of its name. Without it the last attempt is read.
    type: str
author:
  - The khod authors (@khod)
extends_documentation_fragment:
  - action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: linux
"""

EXAMPLES = r"""
- name: Keep the report of the last attempt beside the inventory
  khod.kho.kho_report:
  register: kept
"""

RETURN = r"""
report:
  description: The report, with the verdict, the timeline and what each producer answered.
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.khod.kho.plugins.module_utils.khoctl import Khoctl


def main():
    """Read the report."""
    module = AnsibleModule(argument_spec={"run": {"type": "str"}}, supports_check_mode=True)
    khoctl, run = Khoctl(module), module.params["run"]
    if not khoctl.is_installed:
        module.fail_json(msg="khoctl is not installed")
    dummy, found, err = khoctl.ask("report", *([run] if run else []))
    if not isinstance(found, dict):
        module.fail_json(msg="There is no report: %s" % err)
    module.exit_json(changed=False, report=found)


if __name__ == "__main__":
    main()
