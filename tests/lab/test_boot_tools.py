# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khoctl reads of versions and of GRUB's environment, held against the programs these belong to; nothing boots."""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

import pytest

from khoctl.boot import grubenv
from khoctl.boot.versions import compare_versions
from tests.lab.process import call

ORDER = {0: 0, 11: 1, 12: -1}
"""What the exit statuses of `systemd-analyze compare-versions` mean."""
NAMES = ("saved_entry", "next_entry", "kernelopts", "x")


def text(chance: Random, characters: str) -> str:
    return "".join(chance.choice(characters) for _ in range(chance.randrange(9)))


def test_versions_sort_as_systemd_analyze_has_them() -> None:
    chance = Random(1)
    pairs = [(text(chance, "0123ab.~^-+_A"), text(chance, "0123ab.~^-+_A")) for _ in range(300)]
    wrong = []
    for left, right in pairs:
        argv = ["systemd-analyze", "compare-versions", "--", left, right]
        status = subprocess.run(argv, capture_output=True, check=False).returncode
        if ORDER[status] != compare_versions(left, right):
            wrong.append((left, right, status))
    assert wrong == []


@pytest.mark.parametrize("seed", range(40))
def test_an_environment_block_holds_what_grub_editenv_put_in(tmp_path: Path, seed: int) -> None:
    chance, wanted = Random(seed), dict[str, str]()
    block = tmp_path / "boot/grub/grubenv"
    block.parent.mkdir(parents=True)
    call(["grub-editenv", block, "create"])
    for _ in range(chance.randrange(6)):
        name = chance.choice(NAMES)
        wanted[name] = text(chance, "ab \\\n#=$'\"é")
        call(["grub-editenv", block, "set", f"{name}={wanted[name]}"])
        if chance.random() < 0.3:
            call(["grub-editenv", block, "unset", name])
            del wanted[name]
    found = grubenv.read_variables(tmp_path)
    assert {name: found[name] for name in found if name in NAMES} == wanted
