#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_facts
short_description: Read what khod knows of this host's kernel handovers
description:
  - Reads the state of the handover, the verdict of the one that led into this boot, and the last attempts.
  - A host without KHO or without khod is not an error. C(kho.available) is false there, and C(kho.reason) says why.
options:
  profile:
    description: The profile whose unit is read, too.
    type: str
author:
  - The khod authors (@khod)
extends_documentation_fragment:
  - action_common_attributes
  - action_common_attributes.facts
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  facts:
    support: full
  platform:
    platforms: linux
notes:
  - Who asked for an attempt is shown to root and to members of the group C(kho) only.
"""

EXAMPLES = r"""
- name: Read the facts
  khod.kho.kho_facts:

- name: Show the last verdict
  ansible.builtin.debug:
    msg: "{{ ansible_facts.kho.outcome }} after {{ ansible_facts.kho.blackout_seconds }} s"
  when: ansible_facts.kho.available
"""

RETURN = r"""
ansible_facts:
  description: The facts, below C(kho).
  returned: always
  type: dict
  contains:
    kho:
      description: What khod knows of this host.
      returned: always
      type: dict
      contains:
        available:
          description: Whether a handover is possible here at all.
          returned: always
          type: bool
        reason:
          description: Why it is not.
          returned: always
          type: str
        kernel:
          description: The release of the running kernel.
          returned: when khod answers
          type: str
        boot_id:
          description: The id of this boot.
          returned: when khod answers
          type: str
        phase:
          description: The phase of the handover, as C(khoctl status) has it.
          returned: when khod answers
          type: str
        outcome:
          description: What the handover into this boot came to (C(verified), C(degraded), C(cold_boot), C(idle)).
          returned: when khod answers
          type: str
        history:
          description: The last attempts, the newest first, as C(khoctl history --json) has them.
          returned: always
          type: list
          elements: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.khod.kho.plugins.module_utils.khoctl import Khoctl


def main():
    """Read the facts."""
    module = AnsibleModule(argument_spec={"profile": {"type": "str"}}, supports_check_mode=True)
    facts = Khoctl(module).read_facts(module.params["profile"])
    module.exit_json(changed=False, ansible_facts={"kho": facts})


if __name__ == "__main__":
    main()
