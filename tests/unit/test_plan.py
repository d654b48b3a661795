# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a plan promises: the undo of each step, and none where there is none."""

import hashlib
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.config import Deadlines
from khod.engine.plan import plan_steps
from khod.handover.machine import Machine
from khod.kernel.debugfs import Finalize, Stateless
from khod.kernel.protocol import KhoKernel
from khod.model import Planned
from khod.producers.hooks import Hook
from khod.target.target import Request
from khod.text import MAX_NAMES
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import REPOSITORY, Khod


def steps(kernel: KhoKernel, request: Request, *names: str) -> dict[str, Planned]:
    hooks = [Hook(name) for name in names]
    return {step.step: step for step in plan_steps(Machine(), kernel, hooks, Deadlines(), request, None)}


@pytest.mark.parametrize("generation", [Stateless, Finalize])
def test_a_rollback_after_the_jump_is_promised_for_the_immediate_one_alone(
    tmp_path: Path, generation: type[Stateless]
) -> None:
    """systemd-shutdown goes on to an ordinary reboot where reboot(RB_KEXEC) fails."""
    kernel = generation(HostCalls(tmp_path))
    orderly, now = (steps(kernel, Request(now=now))["execute"] for now in (False, True))
    assert "reboot(2) fails" in now.undo
    assert "cold boot" not in now.undo
    assert "cold boot" in orderly.undo
    assert "as long as systemd has not begun" in orderly.undo
    assert "comes back" not in orderly.undo
    assert orderly.does.startswith("systemctl kexec: the point of no return")


def test_a_plan_that_only_loads_promises_no_jump(tmp_path: Path) -> None:
    assert list(steps(Stateless(HostCalls(tmp_path)), Request(load_only=True))) == ["prepare", "load"]


def test_producers_are_named_in_part_and_fit_for_a_terminal(tmp_path: Path) -> None:
    found = steps(Stateless(HostCalls(tmp_path)), Request(), *(f"p{number}" for number in range(20)))
    assert "p0, p1" in found["prepare"].does
    assert f"and {20 - MAX_NAMES} more" in found["prepare"].does


def test_a_plan_has_the_release_and_the_digests_of_the_next_kernel(tmp_path: Path) -> None:
    """Whoever rolls a fleet compares them with the history, without reading a sentence."""
    khod = Khod(tmp_path)
    try:
        files = {"image": bzimage(), "initrd": CPIO}
        for name, contents in files.items():
            (tmp_path / name).write_bytes(contents)
        found = khod.khoctl("plan", "--image", tmp_path / "image", "--initrd", tmp_path / "initrd", "--json").json
        without = khod.khoctl("plan", "--json").json
    finally:
        khod.close()
    assert found["digests"] == [hashlib.sha256(contents).hexdigest() for contents in files.values()]
    assert found["release"] == "6.8.0-next"
    assert (without["release"], without["digests"]) == ("", [])


PROMISES = ("README.md", "packaging/man/khoctl.8", "packaging/man/khod.8", "packaging/man/kho-producers.7")


@pytest.mark.parametrize("name", PROMISES)
def test_each_document_says_where_the_rollback_ends(name: str) -> None:
    text = " ".join((REPOSITORY / name).read_text().split())
    assert "ordinary reboot" in text or "boots cold" in text
    assert "even that reboot(2) fails" not in text
    assert "refuses on the way" not in text
