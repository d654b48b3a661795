# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the handover into this boot came to is a fact of its own: nothing that is done since changes or hides it."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import ConfigError, Exit, Failed, KhoError, Refused
from khod.handover.record import Record
from khod.model import Phase, Step
from tests.unit.harness import ACTIVE, UNLOAD, Host
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import Khod
from tests.unit.scripted import Scripted, raises
from tests.unit.virtual import VirtualHost, in_virtual_time, never

OUTCOMES = {Phase.verified: Exit.done, Phase.degraded: Exit.degraded, Phase.cold_boot: Exit.degraded}


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    return VirtualHost(tmp_path)


async def arrived(host: VirtualHost, outcome: Phase) -> Engine:
    """A khod in a boot that a handover has led to, with this outcome."""
    host.kernel.set_fault({Phase.verified: "none", Phase.degraded: "lose", Phase.cold_boot: "cold"}[outcome], True)
    await host.jump()
    host.kernel.set_fault("lose", None)
    engine = await host.started()
    await holds(host, engine, outcome)
    return engine


async def holds(host: VirtualHost, engine: Engine, outcome: Phase) -> None:
    """It is told, by this khod and by the next one."""
    for khod in (engine, await host.started()):
        status = await khod.queries.status()
        assert (status.outcome, status.exit_code) == (outcome, OUTCOMES[outcome])
        assert host.record.outcome is outcome


def load(host: Host) -> None:
    """Load an image behind khod's back, as kexec-tools does at boot."""
    with host.request() as request:
        assert request.kernel is not None
        host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim\0", 0)


FOREIGN: dict[str, tuple[Callable[[Host], None], Callable[[Host], None]]] = {
    "an image is loaded": (load, lambda host: host.kernel.kexec_file_load(-1, -1, b"", UNLOAD)),
    "made active by hand": (
        lambda host: host.kernel.echo_to(ACTIVE, "1"),
        lambda host: host.kernel.echo_to(ACTIVE, "0"),
    ),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("what", FOREIGN)
@in_virtual_time
async def test_what_others_do_to_the_kernel_hides_no_outcome(host: VirtualHost, what: str, outcome: Phase) -> None:
    engine = await arrived(host, outcome)
    do, undo = FOREIGN[what]
    do(host)
    await holds(host, engine, outcome)
    status = await engine.queries.status()
    assert (status.foreign, status.phase) == (True, outcome)
    assert "`Abort(force)`" in status.remedy
    with pytest.raises(Refused):
        await engine.activate()
    undo(host)
    assert not (await engine.queries.status()).foreign
    await holds(host, engine, outcome)
    do(host)
    await engine.abort(force=True)
    await holds(host, engine, outcome)


def called_off(at: Phase) -> Callable[[VirtualHost, Engine], Awaitable[None]]:
    async def call_off(host: VirtualHost, engine: Engine) -> None:
        handover = asyncio.ensure_future(host.kexec(engine, load_only=True))
        await host.seen(lambda event: event.phase is at)
        await engine.abort()
        with pytest.raises(Failed):
            await handover

    return call_off


async def vetoed(host: VirtualHost, engine: Engine) -> None:
    Scripted(host, "no", freeze=raises(ValueError("no")))
    with pytest.raises(Refused):
        await engine.activate()
    host.hooks.clear()


async def cut_in_its_sync(host: VirtualHost, engine: Engine) -> None:
    """Before the first step: --now writes out the disks first."""
    with pytest.MonkeyPatch.context() as hung:
        hung.setattr(host.kernel, "sync_disks", never)
        with host.request() as request:
            handover = asyncio.ensure_future(engine.kexec(replace(request, now=True)))
            await asyncio.sleep(1)
            await engine.abort()
            with pytest.raises(Failed):
                await handover


async def broken_file(host: VirtualHost, engine: Engine) -> None:
    """Before the first step: a producer's file is broken since the checks."""
    begun = engine._open_attempt

    async def begin(record: Record) -> object:
        attempt = await begun(record)
        host.broken = ConfigError("no", where="a.toml")
        return attempt

    engine._open_attempt = begin  # type: ignore[method-assign, assignment]
    with pytest.raises(KhoError):
        await engine.activate()
    engine._open_attempt = begun  # type: ignore[method-assign]
    host.broken = None


TRIED: dict[str, Callable[[VirtualHost, Engine], Awaitable[None]]] = {
    "vetoed": vetoed,
    "called off while preparing": called_off(Phase.preparing),
    "called off while loading": called_off(Phase.loading),
    "cut in its sync": cut_in_its_sync,
    "a broken file": broken_file,
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("tried", TRIED)
@in_virtual_time
async def test_a_handover_that_is_rolled_back_leaves_the_outcome(host: VirtualHost, tried: str, outcome: Phase) -> None:
    engine = await arrived(host, outcome)
    await TRIED[tried](host, engine)
    assert engine.machine.phase is outcome
    await holds(host, engine, outcome)
    await engine.activate()
    await engine.abort()
    await holds(host, engine, outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
@in_virtual_time
async def test_a_test_of_a_producer_leaves_the_outcome_whatever_becomes_of_khod(
    host: VirtualHost, outcome: Phase
) -> None:
    engine = await arrived(host, outcome)
    a = Scripted(host, "a")
    await engine.rehearse_producer("a")
    await holds(host, engine, outcome)
    a.does["freeze"] = raises(ValueError("no"))
    with pytest.raises(Refused):
        await engine.rehearse_producer("a")
    await holds(host, engine, outcome)

    at_freeze: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def dies() -> None:
        at_freeze.set_result(None)
        await asyncio.get_running_loop().create_future()

    a.does["freeze"] = dies
    rehearsal = asyncio.ensure_future(engine.rehearse_producer("a"))
    await at_freeze
    engine = host.engine()
    with pytest.raises(Failed):
        await engine.start()
    rehearsal.cancel()
    status = await engine.queries.status()
    assert (status.outcome, status.exit_code) == (outcome, OUTCOMES[outcome])
    assert host.verbs[-2:] == ["a thaw", "a cancel"]


BEGUN = {
    Phase.preparing: (Step.prepare,),
    Phase.prepared: (Step.prepare,),
    Phase.freezing: (Step.prepare, Step.freeze),
    Phase.frozen: (Step.prepare, Step.freeze),
    Phase.activating: (Step.prepare, Step.freeze, Step.activate),
    Phase.active: (Step.prepare, Step.freeze, Step.activate),
    Phase.loading: (Step.prepare, Step.freeze, Step.activate, Step.load),
    Phase.loaded: (Step.prepare, Step.freeze, Step.activate, Step.load),
    Phase.rolling_back: (Step.prepare, Step.freeze, Step.activate),
    Phase.failed: (Step.activate,),
}


@pytest.mark.parametrize("phase", BEGUN)
@in_virtual_time
async def test_a_loss_of_power_before_the_jump_fails_no_later_boot(host: VirtualHost, phase: Phase) -> None:
    Scripted(host, "a")
    host.store.write(Record(phase=phase, done=BEGUN[phase], run="r1", boot_id="the-boot-before", release="7.3.4"))
    engine = await host.started()
    status = await engine.queries.status()
    assert (status.phase, status.exit_code) == (Phase.idle, Exit.done)
    assert phase in (Phase.rolling_back, Phase.failed) or phase.value in status.last_error
    assert host.verbs == [], "nobody of this boot is told of the last one's"
    await engine.activate()
    assert host.verbs == ["a prepare", "a freeze"]


def test_verify_says_what_the_boot_came_to_whatever_is_loaded_since(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    khod = Khod(tmp_path)
    khod.kernel.set_fault("lose", True)
    khod.khoctl("kexec", f"--image={tmp_path / 'vmlinuz'}", f"--initrd={tmp_path / 'initrd'}")
    khod.word("READY=1")
    assert khod.khoctl("verify").code == Exit.degraded
    fds = [os.open(tmp_path / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    khod.kernel.kexec_file_load(fds[0], fds[1], b"root=/dev/sim\0", 0)
    for fd in fds:
        os.close(fd)
    verify = khod.khoctl("verify")
    assert verify.code == Exit.degraded
    khod.close()
    khod = Khod(tmp_path)
    assert khod.khoctl("verify").code == Exit.degraded
    khod.kernel.kexec_file_load(-1, -1, b"", UNLOAD)
    assert khod.khoctl("verify").code == Exit.degraded
    khod.close()
