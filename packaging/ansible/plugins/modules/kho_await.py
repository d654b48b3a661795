#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_await
short_description: Wait for a host that may be in the middle of its jump
description:
  - Waits until the host answers. An interrupted roll-out that is started again may find a host on its way.
  - Where ssh is refused for good, it ends at once. A password is asked for, the host key is unknown or has changed, or
    the name is not known.
  - A host that does not answer is unreachable, and is left out of the rest of the play.
options:
  timeout:
    description: How many seconds to wait.
    type: float
    default: 120
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
- name: Wait for a minute
  khod.kho.kho_await:
    timeout: 60
"""

RETURN = r""" # """
