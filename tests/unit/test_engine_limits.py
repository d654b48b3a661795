# SPDX-License-Identifier: LGPL-2.1-or-later
"""What bounds a handover: the disk, failed activations, kernels that forget at an abort, kernels with another order."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import libfdt
import pytest

from khod.abi.calls import Calls
from khod.config import Checks, Config, Deadlines, Policy
from khod.errors import Exit, Failed, KhoError, NotRolledBack, RecordError, Refused, Unsupported
from khod.handover.record import Store
from khod.kernel.debugfs import FinalizeNoAbort, Stateless
from khod.kernel.probe import Probed
from khod.kernel.protocol import AbortKind, KhoKernel, Tree
from khod.kernel.sysfs import SysfsKho
from khod.model import Generation, Order, Phase, Step
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.images import bzimage, code


class Forgetful(SysfsKho):
    """The embedded kernel driven as a 6.16-6.18 one: its abort forgets what was preserved before."""

    generation = Generation.finalize
    abort = AbortKind.forgets


class LoadFirst(SysfsKho):
    """The embedded kernel driven as one that has nothing to leave and takes the image at any time."""

    generation = Generation.stateless
    order = Order.load_first

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)


class Empty(SysfsKho):
    """The embedded kernel driven as one without any producer: the tree is just `compatible`."""

    def outgoing_tree(self) -> Tree:
        writer = libfdt.FdtSw()
        writer.finish_reservemap()
        writer.begin_node("")
        writer.property_string("compatible", "kho-v1")
        writer.end_node()
        return Tree(bytes(writer.as_fdt().as_bytearray()))


def driven_as(host: Host, kernel: KhoKernel) -> None:
    host.prober = lambda: Probed(kernel, "as the test says", "")
    host.config = replace(host.config, checks=Checks(formats="off"))  # the embedded kernel shows no such trees


def mount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "khod-test", str(path)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room left."""
    fd = os.open(path / "filler", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    with suppress(OSError):
        while True:
            os.write(fd, bytes(1 << 20))
    os.close(fd)
    assert os.statvfs(path).f_bavail == 0


@pytest.fixture
def disk(host: Host) -> Iterator[Path]:
    """The state directory on a file system of its own."""
    path = host.store.directory
    mount(path, "size=64m")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_full_disk_stops_it_before_the_kernel_is_touched(host: Host, disk: Path) -> None:
    host.hook("a")
    fill(disk)
    engine = await host.started()
    with pytest.raises(Refused) as raised:
        await host.kexec(engine)
    assert str(disk) in str(raised.value)
    assert host.kernel.calls == []
    assert host.verbs == []
    assert (await engine.queries.status()).phase is Phase.idle


async def test_a_disk_that_fills_while_active_refuses_to_go_on_and_abort_still_puts_the_kernel_back(
    host: Host, disk: Path
) -> None:
    engine = await host.started()
    await engine.activate()
    fill(disk)
    with pytest.raises(Refused):
        await host.kexec(engine)
    assert (await engine.queries.status()).phase is Phase.active
    await engine.abort()
    assert host.kernel.calls == ["active=1", "active=0"]
    assert (await engine.queries.status()).phase is Phase.idle


async def test_a_step_that_cannot_be_recorded_is_not_taken(host: Host, disk: Path) -> None:
    host.hook("a", {"freeze": f"dd if=/dev/zero of={disk}/filler bs=64k 2> /dev/null; true"})
    engine = await host.started()
    with pytest.raises(RecordError) as raised:
        await host.kexec(engine)
    assert "ENOSPC" in raised.value.what
    assert str(disk) in raised.value.where
    assert host.kernel.calls == []
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    assert (await engine.queries.status()).phase is Phase.idle


async def test_a_read_only_state_directory_stops_it_before_the_kernel_is_touched(host: Host, disk: Path) -> None:
    mount(disk, "remount,ro")
    host.hook("a")
    engine = await host.started()
    with pytest.raises(KhoError) as raised:
        await engine.activate()
    assert raised.value.exit in (Exit.failed, Exit.refused)
    assert str(disk) in str(raised.value)
    assert host.kernel.calls == []
    assert host.verbs == []
    assert (await engine.queries.status()).phase is Phase.idle


async def test_a_missing_state_directory_stops_it_before_the_kernel_is_touched(host: Host) -> None:
    host.store = Store(host.directory / "nowhere")
    engine = await host.started()
    with pytest.raises(Refused) as raised:
        await engine.activate()
    assert "nowhere" in str(raised.value)
    assert host.kernel.calls == []


async def test_failed_activations_are_bounded(host: Host) -> None:
    """Each may leak up to dt_max of kernel memory."""
    host.config = Config(policy=Policy(max_failed_activations=2))
    host.kernel.set_fault("veto", 1)
    engine = await host.started()
    for _attempt in range(2):
        with pytest.raises(Failed):
            await engine.activate()
    with pytest.raises(Refused) as raised:
        await engine.activate()
    assert "max_failed_activations" in raised.value.remedy
    assert host.kernel.calls == ["active=1"] * 2
    engine = await host.started()  # a restart of khod does not give the memory back
    with pytest.raises(Refused):
        await engine.activate()
    assert host.kernel.calls == ["active=1"] * 2


async def test_a_veto_of_a_producer_is_no_failed_activation(host: Host) -> None:
    host.config = Config(policy=Policy(max_failed_activations=1))
    host.hook("a", {"freeze": "exit 1"})
    engine = await host.started()
    for _attempt in range(3):
        with pytest.raises(Refused, match="Producer a"):
            await engine.activate()


async def test_an_abort_that_forgets_makes_the_state_suspect_until_a_reboot(host: Host) -> None:
    driven_as(host, Forgetful(host.kernel))
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    with pytest.raises(Refused) as raised:
        await engine.activate()
    assert "reboot" in str(raised.value).lower()
    engine = await host.started()
    with pytest.raises(Refused):
        await engine.activate()

    host.kernel._boot_kernel("root=/dev/sim rw")
    engine = await host.started()
    await engine.activate()
    assert host.kernel.active


async def test_policy_may_go_on_after_a_forgetful_abort(host: Host) -> None:
    driven_as(host, Forgetful(host.kernel))
    host.config = Config(policy=Policy(after_forgetful_abort="warn"))
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    assert any(check.result.value == "warn" for check in await engine.queries.check())
    await engine.activate()


async def test_a_failed_handover_on_a_forgetful_kernel_is_suspect_too(host: Host) -> None:
    driven_as(host, Forgetful(host.kernel))
    host.kernel.set_fault("load_errno", 12)
    engine = await host.started()
    with pytest.raises(Failed):
        await host.kexec(engine)
    with pytest.raises(Refused):
        await engine.activate()


async def test_a_check_that_is_off_lets_the_jump_go_on_with_one_line(host: Host) -> None:
    """Of another format, which the check `formats` finds all the same."""
    (host.directory / "vmlinuz").write_bytes(bzimage(contents=code(formats=("kho-v4",))))
    host.config = replace(host.config, checks=Checks(formats="off"))
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert len([event for event in host.events if "going on all the same" in event.message]) == 1
    assert any("would not take over any state" in event.message and "kho-v4" in event.message for event in host.events)


async def test_a_clean_abort_makes_nothing_suspect(host: Host) -> None:
    engine = await host.started()
    for _attempt in range(2):
        await engine.activate()
        await engine.abort()


async def test_load_first_loads_before_anyone_is_frozen(host: Host) -> None:
    driven_as(host, LoadFirst(host.kernel))
    host.hook("a")
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert host.kernel.calls == ["load", "active=1", "reboot"]
    for noted, step in zip(host.kernel.noted, (Step.load, Step.activate, Step.execute), strict=True):
        assert step in noted.recorded.done, noted.what
    assert Step.freeze not in host.kernel.noted[0].recorded.done
    assert host.verbs == ["a prepare", "a freeze"]


async def test_load_first_is_put_back_in_the_reverse_of_its_own_order(host: Host) -> None:
    driven_as(host, LoadFirst(host.kernel))
    host.hook("a")
    host.kernel.set_fault("reboot_errno", 16)
    engine = await host.started()
    with pytest.raises(Failed):
        await host.kexec(engine)
    assert host.kernel.calls == ["load", "active=1", "reboot", "active=0", "unload"]
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    assert (await engine.queries.status()).phase is Phase.idle


@pytest.mark.parametrize("required", [False, True])
async def test_a_handover_of_nothing_looks_like_a_success_and_may_be_forbidden(host: Host, required: bool) -> None:
    driven_as(host, Empty(host.kernel))
    host.config = Config(policy=Policy(require_state=required))
    engine = await host.started()
    if not required:
        await engine.activate()
        return
    with pytest.raises(Refused, match="require_state"):
        await engine.activate()
    assert host.kernel.calls == ["active=1", "active=0"]
    assert (await engine.queries.status()).phase is Phase.idle


@pytest.mark.parametrize("generation", [Stateless, FinalizeNoAbort])
async def test_generations_without_an_abort_have_nothing_suspect(generation: type[Stateless]) -> None:
    assert generation.abort is AbortKind.needless
    assert generation.order is Order.load_first


async def test_a_kernel_without_kho_is_unsupported(host: Host) -> None:
    host.prober = lambda: Probed(None, "no KHO here", "boot another")
    engine = await host.started()
    with pytest.raises(Unsupported) as raised:
        await engine.activate()
    assert raised.value.exit is Exit.unsupported
    assert raised.value.remedy == "boot another"
    status = await engine.queries.status()
    assert (status.phase, status.generation) == (Phase.idle, Generation.none)
    assert "no KHO here" in status.summary


async def test_a_kernel_that_outlasts_the_deadline_is_put_back_when_it_comes_back(host: Host) -> None:
    host.config = Config(deadlines=Deadlines(activate=0.2, rollback=0.2, observe=0.1))
    host.hook("a")
    engine = await host.started()
    host.kernel.gate.clear()
    try:
        with pytest.raises(NotRolledBack):
            await engine.activate()
        status = await engine.queries.status()
        assert status.stale, "the kernel does not answer yet"
        assert status.phase is Phase.failed
        assert status.left == ["activate"]
        assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    finally:
        host.kernel.gate.set()
    host.config = Config()
    engine.settings.current = host.config
    await engine.abort()
    status = await engine.queries.status()
    assert (status.phase, status.kernel_active) == (Phase.idle, False)
