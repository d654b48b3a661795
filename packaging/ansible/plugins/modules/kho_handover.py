#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_handover
short_description: Take a host to the next kernel by a handover, and prove that it arrived
description:
  - Has systemd run a profile on the host, as C(khoctl handover PROFILE --no-block) does, waits through the jump, and
    returns what the handover came to. The run continues on the host, whatever becomes of the connection.
  - A handover counts as arrived only if the host is in another boot than before, and the run that was begun stands in
    its history with the boot it began in and the boot it arrived in. That the host is up again is no proof.
  - Where the host runs the target of the profile, and the handover into it was verified, nothing is done. The target is
    the release, the files of kernel and initrd by their SHA-256, and the words of the command line.
  - No clock of the host is compared with the controller's.
  - With the connection plugin C(ssh), ssh asks no question (C(BatchMode)), so a password or an unknown or changed host
    key ends the task at once.
options:
  profile:
    description: The name of the profile, a file of C(/etc/kho/handover.d) without its C(.toml).
    type: str
    required: true
  timeout:
    description: How many seconds the handover may take until it is verified, boot included.
    type: float
    default: 900
  connect_timeout:
    description: How many seconds of them to wait for a host that does not answer at the beginning.
    type: float
    default: 0
  blackout_budget:
    description:
      - The longest blackout in seconds that is accepted. A longer one makes the task fail with RV(outcome=over_budget).
      - The measured figure counts, whatever its error. A blackout that is not known is not over the budget.
    type: float
  report:
    description: Whether to return the report of the attempt, too.
    type: bool
    default: true
  rollout:
    description:
      - The name of the roll-out this handover belongs to; see M(khod.kho.kho_claim). With it, a handover that was begun
        before the controller was interrupted is waited for, and not begun again.
    type: str
  directory:
    description: Where M(khod.kho.kho_claim) keeps the claim on the host.
    type: path
    default: /var/lib/khod-ansible
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
    details: The result is the plan.
  diff_mode:
    support: full
    details: The diff has the release of both kernels and the words of the command line.
  platform:
    platforms: linux
seealso:
  - module: khod.kho.kho_check
"""

EXAMPLES = r"""
- name: Hand over by the profile weekly
  khod.kho.kho_handover:
    profile: weekly
    blackout_budget: 8
"""

RETURN = r"""
outcome:
  description:
    - C(verified) or C(unchanged). The task succeeds.
    - C(no_kho), where the host has no KHO or no khod. The task is skipped.
    - C(planned), in check mode.
    - Any other value makes the task fail.
    - C(refused), C(claimed) and C(busy) leave the host untouched; C(rolled_back) leaves it in its kernel.
    - C(not_rolled_back), where something could not be undone; C(still_under_way), where it had not ended at the
      deadline; C(never_came_back), where the host was not reached any more.
    - C(degraded), C(over_budget) and C(cold_boot) are the outcomes of a host in its next boot.
  returned: always
  type: str
run:
  description: The id of the run.
  returned: when a handover was begun or led into this boot
  type: str
reason:
  description: Why it is not verified.
  returned: always
  type: str
kernel:
  description: The release of the running kernel.
  returned: when the handover has ended
  type: str
previous_kernel:
  description: The release of the kernel before.
  returned: when the handover has ended
  type: str
boot_id:
  description: The id of this boot.
  returned: when the handover has ended
  type: str
blackout_seconds:
  description: How long the producers were stopped; null where it is not known.
  returned: when the handover has ended
  type: float
blackout_error_seconds:
  description: The maximum error of the blackout.
  returned: when the handover has ended
  type: float
past_blackouts:
  description: The blackouts of earlier verified handovers of this host, the newest first.
  returned: when the handover has ended
  type: list
  elements: float
verdict:
  description: The verdict with its evidence, as C(khoctl verify --json) has it.
  returned: when the host has jumped
  type: dict
report:
  description: The report, as C(khoctl report --json) has it.
  returned: with O(report=true)
  type: dict
"""
