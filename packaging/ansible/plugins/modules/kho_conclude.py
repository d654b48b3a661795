#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_conclude
short_description: End a roll-out with the exit code its hosts call for
description:
  - The last task of a roll-out. It runs on the controller, and connects to no host.
  - A host without KHO was skipped, and so was one that was not touched. C(ansible-playbook) exits with 4 for both, and
    its recap counts them as unreachable, apart from those that failed.
  - A host whose handover failed makes the task fail, and C(ansible-playbook) exits with 2.
options:
  result:
    description: The fact C(rolling_result) of the host; empty for one that was not touched.
    type: dict
    required: true
author:
  - The khod authors (@khod)
extends_documentation_fragment:
  - action_common_attributes
  - action_common_attributes.flow
attributes:
  action:
    support: full
  async:
    support: none
  bypass_host_loop:
    support: none
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: linux
"""

EXAMPLES = r"""
- name: End with what the host came to
  khod.kho.kho_conclude:
    result: "{{ rolling_result | default({}) }}"
"""

RETURN = r"""
outcome:
  description: The outcome of the host.
  returned: always
  type: str
"""
