#!/usr/bin/python
# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kho_claim
short_description: Claim a host for one roll-out, and begin its handover once
description:
  - Keeps a claim in a file of the host, which outlives the jump. A host is claimed by one roll-out at a time; what
    another one holds is refused, and not waited for.
  - Whoever comes back with the same O(rollout) goes on where it was. A handover that was begun is not begun again, and
    a host that is through is not touched again.
  - The role C(khod.kho.rolling) and M(khod.kho.kho_handover) call this module.
options:
  state:
    description:
      - V(held) claims the host.
      - V(begun) has systemd run the profile, unless this roll-out has done that already. Before that, the boot id and
        the runs of the history are written to the claim, so that an interrupted roll-out finds its handover again.
      - V(finished) keeps the outcome. Another roll-out may claim the host from then on.
      - V(absent) removes any claim, also that of another roll-out which will not come back.
    type: str
    choices: [held, begun, finished, absent]
    required: true
  rollout:
    description: The name of the roll-out. Without it V(begun) only refuses a host that is claimed.
    type: str
  profile:
    description: The profile to run. Required with O(state=begun).
    type: str
  owner:
    description: Who rolls out, for the message that another roll-out gets.
    type: str
    default: ''
  result:
    description: What RV(claim.result) is to be. Required with O(state=finished).
    type: dict
  connect_timeout:
    description:
      - How many seconds to wait for a host that does not answer. An interrupted roll-out that is started again may find
        it in its jump.
      - Where ssh is refused for good, nothing is waited for. A password is asked for, the host key is unknown or has
        changed, or the name is not known.
    type: float
    default: 0
  directory:
    description: Where the claim is kept. It must outlive a boot.
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
  diff_mode:
    support: none
  platform:
    platforms: linux
"""

EXAMPLES = r"""
- name: Give a host back that a roll-out has left behind for good
  khod.kho.kho_claim:
    state: absent
"""

RETURN = r"""
claim:
  description: The claim as it stands now.
  returned: always
  type: dict
  contains:
    state:
      description: C(held), C(begun), C(finished), or C(absent).
      returned: always
      type: str
    rollout:
      description: The roll-out that has it.
      returned: unless absent
      type: str
    boot_id:
      description: The boot in which the handover was begun.
      returned: once begun
      type: str
    runs:
      description: The runs that the history had before.
      returned: once begun
      type: list
      elements: str
    result:
      description: What the handover came to.
      returned: when finished
      type: dict
outcome:
  description: C(claimed) where another roll-out has this host, C(busy) where a handover is under way, C(no_kho) on a
    host that does not offer KHO, C(refused) where khod cannot be asked.
  returned: on failure
  type: str
"""

import contextlib
import fcntl
import json
import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.khod.kho.plugins.module_utils.khoctl import Khoctl
from ansible_collections.khod.kho.plugins.module_utils.outcome import ARRIVED, is_under_way

ABSENT = {"state": "absent"}


class Claim:
    """The claim of this host; the file is locked while it is read and written."""

    def __init__(self, module):
        self._module = module
        self._path = os.path.join(module.params["directory"], "claim.json")
        self.found = ABSENT

    @contextlib.contextmanager
    def locked(self):
        """Keep every other one out, and have `found` as it stands; check mode makes no files."""
        if self._module.check_mode and not os.path.exists(self._path):
            yield
            return
        os.makedirs(os.path.dirname(self._path), mode=0o755, exist_ok=True)
        with open(self._path + ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.found = self._read()
            yield

    def _read(self):
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except FileNotFoundError:
            return ABSENT
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("state"), str):
            self._module.fail_json(
                msg="%s is damaged. See khoctl history; then remove the file." % self._path, outcome="claimed"
            )
        return found

    def write(self, **fields):
        """Replace the claim; what is returned is on the disk."""
        self.found = fields
        if self._module.check_mode:
            return
        with open(self._path + ".new", "w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._path + ".new", self._path)
        self._sync()

    def remove(self):
        """Remove the claim."""
        self.found = ABSENT
        if not self._module.check_mode:
            os.unlink(self._path)
            self._sync()

    def _sync(self):
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def is_of_another(self, rollout):
        """Whether another roll-out has this host, and is not through with it."""
        return self.found["state"] in ("held", "begun") and self.found.get("rollout") != rollout

    def is_mine(self, rollout):
        """Whether this roll-out has the claim, whatever its state."""
        return self.found["state"] != "absent" and self.found.get("rollout") == rollout


def main():
    """Do what `state` asks for."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": ["held", "begun", "finished", "absent"]},
            "rollout": {"type": "str"},
            "profile": {"type": "str"},
            "owner": {"type": "str", "default": ""},
            "result": {"type": "dict"},
            "connect_timeout": {"type": "float", "default": 0},
            "directory": {"type": "path", "default": "/var/lib/khod-ansible"},
        },
        required_if=[
            ("state", "held", ["rollout"]),
            ("state", "begun", ["profile"]),
            ("state", "finished", ["rollout", "result"]),
        ],
        supports_check_mode=True,
    )
    claim = Claim(module)
    with claim.locked():
        before = claim.found
        if module.params["state"] != "absent" and claim.is_of_another(module.params["rollout"]):
            refuse_claimed(module, claim)
        STATES[module.params["state"]](module, claim)
        module.exit_json(changed=claim.found != before, claim=claim.found)


def refuse_claimed(module, claim):
    """End the module: another roll-out has this host."""
    owner = claim.found.get("owner") or "an unknown user"
    module.fail_json(
        msg="Roll-out %s (%s) has this host, in state %s, and nothing was touched. Wait until it has ended or continue "
        "it under this name. If it will never come back: khod.kho.kho_claim with state=absent."
        % (claim.found.get("rollout") or "without a name", owner, claim.found["state"]),
        outcome="claimed",
        claim=claim.found,
    )


def hold(module, claim):
    """Claim the host, unless this roll-out has it, or is through with it; one without KHO is not claimed."""
    given = module.params
    facts = Khoctl(module).read_facts()
    if not facts["available"]:
        unknown = facts.get("reachable") is False
        module.fail_json(msg=facts["reason"], outcome="refused" if unknown else "no_kho", claim=claim.found)
    through = claim.found["state"] == "finished" and claim.found.get("result", {}).get("outcome") in ARRIVED
    if claim.is_mine(given["rollout"]) and (through or claim.found["state"] != "finished"):
        return
    claim.write(state="held", rollout=given["rollout"], owner=given["owner"])


def begin(module, claim):
    """Have systemd run the profile, once in this roll-out."""
    given, khoctl = module.params, Khoctl(module)
    mine = given["rollout"] is not None
    if mine and not claim.is_mine(given["rollout"]):
        module.fail_json(msg="This roll-out has not claimed the host: state=held comes first.", outcome="claimed")
    if mine and claim.found["state"] != "held":
        return
    facts = khoctl.read_facts(given["profile"])
    if not facts["available"]:
        module.fail_json(msg=facts["reason"], outcome="no_kho", claim=claim.found)
    if is_under_way(facts):
        begun = facts["begun"] or {}
        module.fail_json(
            msg="A handover is under way already (%s), begun by %s. Follow it with khoctl wait."
            % (facts["phase"], begun.get("by") or "an unknown user"),
            outcome="busy",
            claim=claim.found,
        )
    held, begun = claim.found, {
        "state": "begun",
        "rollout": given["rollout"],
        "owner": given["owner"],
        "profile": given["profile"],
        "boot_id": facts["boot_id"],
        "runs": [one["run"] for one in facts["history"]],
    }
    if mine:
        claim.write(**begun)
    claim.found = begun
    wrong = "" if module.check_mode else khoctl.start_unit(given["profile"])
    if wrong:
        if mine:
            claim.write(**held)
        module.fail_json(msg="Profile %s was not started: %s" % (given["profile"], wrong), outcome="refused")


def finish(module, claim):
    """Keep the outcome; the host is free for another roll-out."""
    given = module.params
    owner = given["owner"] or claim.found.get("owner", "")
    claim.write(state="finished", rollout=given["rollout"], owner=owner, result=given["result"])


def give_back(module, claim):
    """Remove any claim."""
    if claim.found["state"] != "absent":
        claim.remove()


STATES = {"held": hold, "begun": begin, "finished": finish, "absent": give_back}


if __name__ == "__main__":
    main()
