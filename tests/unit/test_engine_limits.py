"""What bounds a handover: the disk, failed activations, kernels that forget at an abort, kernels with another order."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.abi.calls import Calls
from khod.config import Config, Deadlines, Policy
from khod.errors import Exit, Failed, NotRolledBack, RecordError, Refused, Unsupported
from khod.kernel.debugfs import FinalizeNoAbort, Stateless
from khod.kernel.probe import Probed
from khod.kernel.protocol import AbortKind, KhoKernel
from khod.kernel.simulated import Rebooted
from khod.kernel.sysfs import SysfsKho
from khod.model import Generation, Order, Phase
from khod.record import Store
from tests.unit.harness import Host


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


def driven_as(host: Host, kernel: KhoKernel) -> None:
    host.prober = lambda: Probed(kernel, "as the test says", "")


@pytest.fixture
def small_disk(host: Host) -> Iterator[Path]:
    """The state directory on a tmpfs of its own, of 256 KiB."""
    path = host.store.directory
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "khod-test", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_full_disk_stops_it_before_the_kernel_is_touched(host: Host, small_disk: Path) -> None:
    host.hook("a")
    (small_disk / "filler").write_bytes(b"x" * (200 << 10))
    engine = await host.started()
    with pytest.raises(Refused) as raised:
        await host.kexec(engine)
    assert str(small_disk) in str(raised.value)
    assert host.kernel.calls == []
    assert host.verbs == []
    assert (await engine.status()).phase is Phase.idle


async def test_a_disk_that_fills_later_does_not_keep_the_kernel_from_being_put_back(
    host: Host, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    engine = await host.started()
    await engine.activate()
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(b"x" * (1 << 20))
    with pytest.raises(RecordError):
        await host.kexec(engine)
    assert "load" not in host.kernel.calls, "a step that cannot be recorded is not taken"
    assert not host.kernel.active
    assert (await engine.status()).phase is Phase.idle


async def test_a_read_only_state_directory_stops_it_before_the_kernel_is_touched(host: Host, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m,ro", str(small_disk)], check=True)
    engine = await host.started()
    with pytest.raises(RecordError) as raised:
        await engine.activate()
    assert str(small_disk) in raised.value.where
    assert host.kernel.calls == []
    assert (await engine.status()).phase is Phase.idle


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
    host.kernel.fault("veto", 1)
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

    host.kernel._boot("root=/dev/sim rw")
    engine = await host.started()
    await engine.activate()
    assert host.kernel.active


async def test_policy_may_go_on_after_a_forgetful_abort(host: Host) -> None:
    driven_as(host, Forgetful(host.kernel))
    host.config = Config(policy=Policy(after_forgetful_abort="warn"))
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    assert any(check.result.value == "warn" for check in await engine.check())
    await engine.activate()


async def test_a_failed_handover_on_a_forgetful_kernel_is_suspect_too(host: Host) -> None:
    driven_as(host, Forgetful(host.kernel))
    host.kernel.fault("load_errno", 12)
    engine = await host.started()
    with pytest.raises(Failed):
        await host.kexec(engine)
    with pytest.raises(Refused):
        await engine.activate()


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
    assert [(noted.what, noted.recorded) for noted in host.kernel.noted] == [
        ("load", Phase.loading),
        ("active=1", Phase.activating),
        ("reboot", Phase.executing),
    ]


async def test_load_first_is_put_back_in_the_reverse_of_its_own_order(host: Host) -> None:
    driven_as(host, LoadFirst(host.kernel))
    host.hook("a")
    host.kernel.fault("reboot_errno", 16)
    engine = await host.started()
    with pytest.raises(Failed):
        await host.kexec(engine)
    assert host.kernel.calls == ["load", "active=1", "reboot", "active=0", "unload"]
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    assert (await engine.status()).phase is Phase.idle


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
    status = await engine.status()
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
        status = await engine.status()
        assert status.stale, "the kernel does not answer yet"
        assert status.phase is Phase.failed
        assert status.left == ["activate"]
        assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    finally:
        host.kernel.gate.set()
    host.config = Config()
    engine.config = host.config
    await engine.abort()
    status = await engine.status()
    assert (status.phase, status.kernel_active) == (Phase.idle, False)
