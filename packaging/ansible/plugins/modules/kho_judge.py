#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_judge
short_description: Judge a batch of handovers, and stop the roll-out where it made hosts worse
description:
  - Reads the fact C(rolling_result) of each host, which the role C(khod.kho.rolling) sets. It runs on the
    controller, and connects to no host.
  - The task fails where a host of the batch is degraded, booted cold, was lost or is over its budget, or where the
    blackouts of the batch are longer than those of the history.
  - That is found by Wilcoxon's rank-sum test, one-sided and exact, in strata. By default each host is compared with its
    own history; hosts with the same C(rolling_stratum) are compared with the history of all of them.
  - Each batch has the share of O(alpha) that it has of the hosts, so the probability that a roll-out in which nothing
    became slower is stopped by this test is O(alpha) at most. Where too little is known of the past to tell anything
    at that level, the output says so.
options:
  batch:
    description: The hosts of the batch.
    type: list
    elements: str
    required: true
  hosts:
    description: All hosts of the roll-out.
    type: list
    elements: str
    required: true
  alpha:
    description: The probability of a false stop in the whole roll-out, 0.01 at most. With 0 there is no test.
    type: float
    default: 0.01
  margin:
    description: The part by which blackouts may become longer. With 0.05 they may be longer by 5 %.
    type: float
    default: 0
  go_on_after:
    description: Outcomes that do not stop the roll-out, for instance V(refused).
    type: list
    elements: str
    default: []
  show_table:
    description: Whether to print the table of all hosts also where nothing stops.
    type: bool
    default: false
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
- name: Judge the batch
  khod.kho.kho_judge:
    batch: "{{ ansible_play_batch }}"
    hosts: "{{ ansible_play_hosts_all }}"
  run_once: true
"""

RETURN = r"""
judgement:
  description: The result of the test.
  returned: with an alpha above 0
  type: dict
  contains:
    worse:
      description: Whether the blackouts are longer; null where that could not be told.
      returned: always
      type: bool
    p:
      description: The probability of ranks like these or worse by chance.
      returned: when it could be told
      type: float
    alpha:
      description: The level of this batch.
      returned: always
      type: float
reasons:
  description: Why the roll-out stops, one sentence each.
  returned: always
  type: list
  elements: str
table:
  description: The table of all hosts, one line each.
  returned: always
  type: list
  elements: str
"""
