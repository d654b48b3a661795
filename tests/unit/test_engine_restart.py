# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod dies at every phase and another one starts; the host boots cold, loses state, or was driven by somebody else."""

import asyncio
import errno
from contextlib import suppress

import pytest

from khod.config import Config, Policy
from khod.errors import Exit, Failed, KhoError
from khod.handover.record import Record
from khod.model import Generation, Phase, Step
from khod.simulated.kernel import Rebooted
from khod.target.target import Request
from tests.unit.harness import ACTIVE, Host

P, S = Phase, Step

# Each phase khod may be killed in on a v3 kernel: the steps its record names as begun, and whether the
# kernel got as far as having been activated or loaded. A step under way may have had its effect or not.
KILLED = [
    (P.preparing, (S.prepare,), False, False),
    (P.prepared, (S.prepare,), False, False),
    (P.freezing, (S.prepare, S.freeze), False, False),
    (P.frozen, (S.prepare, S.freeze), False, False),
    (P.activating, (S.prepare, S.freeze, S.activate), False, False),
    (P.activating, (S.prepare, S.freeze, S.activate), True, False),
    # activate and load may be recorded together, to have one fsync less within the blackout
    (P.activating, (S.prepare, S.freeze, S.activate, S.load), False, False),
    (P.activating, (S.prepare, S.freeze, S.activate, S.load), True, False),
    (P.activating, (S.prepare, S.freeze, S.activate, S.load), True, True),
    (P.active, (S.prepare, S.freeze, S.activate), True, False),
    (P.loading, (S.prepare, S.freeze, S.activate, S.load), True, False),
    (P.loading, (S.prepare, S.freeze, S.activate, S.load), True, True),
    (P.loaded, (S.prepare, S.freeze, S.activate, S.load), True, True),
    (P.executing, tuple(S), True, True),
    (P.rolling_back, (S.prepare, S.freeze, S.activate, S.load), True, True),
    (P.rolling_back, (S.prepare, S.freeze, S.activate, S.load), True, False),
    (P.rolling_back, (S.prepare, S.freeze, S.activate), False, False),
    (P.rolling_back, (S.prepare,), False, False),
]


async def killed_at(host: Host, phase: Phase, done: tuple[Step, ...], active: bool, loaded: bool) -> None:
    """Leave the host as a khod leaves it that is killed there."""
    if active:
        host.kernel.echo_to(ACTIVE, "1")
    if loaded:
        with host.request() as request:
            assert request.kernel is not None
            host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim khod.run=r1\0", 0)
    boot_id = host.kernel.read_file("/proc/sys/kernel/random/boot_id").decode().strip()
    host.store.write(Record(phase=phase, done=done, run="r1", boot_id=boot_id, generation=Generation.sysfs))
    host.kernel.noted.clear()


async def start(host: Host) -> None:
    """A khod starts on this host; that it found something to put back is an error it tells."""
    with suppress(Failed):
        await host.engine().start()


@pytest.mark.parametrize(("phase", "done", "active", "loaded"), KILLED)
async def test_killed_at_any_phase_everything_is_put_back_at_the_next_start(
    host: Host, phase: Phase, done: tuple[Step, ...], active: bool, loaded: bool
) -> None:
    host.hook("a")
    host.hook("b", after=("a",))
    await killed_at(host, phase, done, active, loaded)
    await start(host)

    assert not host.kernel.active
    assert not host.kernel.loaded
    assert host.record.phase is Phase.idle
    undo = [call for call in ("unload", "active=0") if call in host.kernel.calls]
    assert host.kernel.calls == undo, "nothing but undo, the unload first"
    thawed = ["b thaw", "a thaw"] if S.freeze in done else []
    assert host.verbs == [*thawed, "b cancel", "a cancel"], (
        "every producer that may have been told is told that it is off"
    )


@pytest.mark.parametrize("last", ["active", "loaded"])
async def test_a_khod_that_just_disappears_is_followed_by_one_that_puts_back(host: Host, last: str) -> None:
    host.hook("a")
    engine = await host.started()
    if last == "active":
        await engine.activate()
    else:
        await host.kexec(engine, load_only=True)
    del engine
    await start(host)
    assert not host.kernel.active
    assert not host.kernel.loaded
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]


@pytest.mark.parametrize("last", ["active", "loaded"])
async def test_resume_goes_on_from_where_it_stood(host: Host, last: str) -> None:
    host.hook("a")
    engine = await host.started()
    if last == "active":
        await engine.activate()
    else:
        await host.kexec(engine, load_only=True)
    host.config = Config(policy=Policy(after_daemon_died="resume"))
    engine = await host.started()
    assert (await engine.queries.status()).phase.value == last
    assert host.kernel.calls == ["active=1", "load"][: 1 + (last == "loaded")]
    with pytest.raises(Rebooted):
        await host.kexec(engine) if last == "active" else await engine.kexec(Request())
    assert (await (await host.started()).queries.status()).phase is Phase.verified


async def test_resume_then_abort_tells_the_producers(host: Host) -> None:
    host.hook("a")
    await (await host.started()).activate()
    host.config = Config(policy=Policy(after_daemon_died="resume"))
    engine = await host.started()
    await engine.abort()
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    assert not host.kernel.active


async def test_a_restart_after_a_rollback_that_failed_still_says_so(host: Host) -> None:
    engine = await host.started()
    await engine.activate()
    host.kernel.set_fault("abort_errno", errno.EBUSY)
    with pytest.raises(KhoError):
        await engine.abort()
    engine = await host.started()
    status = await engine.queries.status()
    assert (status.phase, status.exit_code, status.left) == (Phase.failed, Exit.not_rolled_back, ["activate"])
    host.kernel.set_fault("abort_errno", None)
    await engine.abort()
    assert not host.kernel.active
    assert host.record.phase is Phase.idle


async def test_a_restart_does_not_forget_a_producer_that_could_not_be_thawed(host: Host) -> None:
    stuck = host.directory / "stuck"
    stuck.touch()
    host.hook("a", {"thaw": f"test ! -e {stuck}"})
    engine = await host.started()
    await engine.activate()
    with pytest.raises(KhoError):
        await engine.abort()
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.failed
    assert (await engine.queries.status()).left == ["prepare", "freeze"]
    stuck.unlink()
    await engine.abort()
    assert host.verbs.count("a thaw") == 2
    assert (await engine.queries.status()).phase is Phase.idle


async def test_stop_puts_back_what_is_held(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    await engine.stop(jumping=False)
    assert host.kernel.calls == ["active=1", "load", "unload", "active=0"]
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]


async def test_stop_on_the_way_into_the_kexec_keeps_everything(host: Host) -> None:
    async def systemctl_kexec() -> None:
        """Returns when the shutdown is under way."""

    engine = await host.started(orderly=systemctl_kexec)
    await host.kexec(engine)
    assert (await engine.queries.status()).phase is Phase.executing
    await engine.stop(jumping=True)
    assert host.kernel.calls == ["active=1", "load"]
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    assert (await (await host.started()).queries.status()).phase is Phase.verified


async def test_stop_after_the_shutdown_was_called_off_puts_back(host: Host) -> None:
    """Design: stopping khod while active rolls back, unless the system is on its way into the kexec."""

    async def systemctl_kexec() -> None:
        """Returns when the shutdown is under way."""

    engine = await host.started(orderly=systemctl_kexec)
    await host.kexec(engine)
    await engine.stop(jumping=False)
    assert host.kernel.calls == ["active=1", "load", "unload", "active=0"]
    assert host.record.phase is Phase.idle


async def test_a_jump_somebody_else_makes_with_khod_s_image_is_verified(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    await engine.stop(jumping=True)
    assert host.events[-1].phase is Phase.executing, "or who watches takes the end of khod for another one"
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    assert (await (await host.started()).queries.status()).phase is Phase.verified


async def test_what_is_asked_while_khod_starts_waits_for_the_start(host: Host) -> None:
    """With socket activation the first request is what starts khod."""
    host.kernel.gate.clear()
    await killed_at(host, Phase.idle, (), False, False)
    engine = host.engine()
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    activation = asyncio.ensure_future(engine.activate())
    host.kernel.gate.set()
    await starting
    await activation
    assert host.kernel.active


async def test_the_reason_of_a_rollback_at_the_start_is_told(host: Host) -> None:
    await (await host.started()).activate()
    engine = host.engine()
    with pytest.raises(Failed):
        await engine.start()
    status = await engine.queries.status()
    assert status.phase is Phase.idle
    assert "stopped unexpectedly" in status.last_error
