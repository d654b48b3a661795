# SPDX-License-Identifier: LGPL-2.1-or-later
"""`executing` is watched: nothing is undone under a jump that may still happen, and one that does not is noticed."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from khod.config import Config, Deadlines
from khod.engine import Engine
from khod.errors import KhoError, NotRolledBack, Refused
from khod.kernel.kexec import Kexec
from khod.model import Phase
from khod.simulated.kernel import Rebooted
from khod.systemd import shutdown
from tests.unit.scripted import Scripted, hangs
from tests.unit.test_engine_limits import LoadFirst, driven_as
from tests.unit.virtual import InlineWorker, VirtualHost, in_virtual_time, never, now

TOLD = ["a prepare", "a freeze"]
UNDONE = [*TOLD, "a thaw", "a cancel"]
EXECUTE = 90.0


class Systemd:
    """Says whether the host is on its way into the kexec: the answer of the moment, or those to come."""

    def __init__(self, *answers: bool | None) -> None:
        self.answers = list(answers)

    async def __call__(self) -> bool | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    made = VirtualHost(tmp_path)
    made.config = Config(deadlines=Deadlines(execute=EXECUTE))
    Scripted(made, "a")
    return made


async def taken() -> None:
    """Do as `systemctl kexec` does that systemd takes: it returns, and the shutdown is under way."""


async def executing(host: VirtualHost, down: bool | None, jump: Callable[[], Awaitable[None]] = taken) -> Engine:
    """A khod that has asked for the jump, and systemd's answer whether it comes."""
    host.shutdown = Systemd(down)
    engine = await host.started(orderly=jump)
    await host.kexec(engine)
    assert engine.machine.phase is Phase.executing
    return engine


def nothing_undone(host: VirtualHost) -> bool:
    return host.verbs == TOLD and host.kernel.active and host.kernel.loaded


async def rolled_back(host: VirtualHost, engine: Engine) -> None:
    while engine.machine.phase in (Phase.executing, Phase.rolling_back):
        await host.seen(lambda _event: True)
    assert engine.machine.phase is Phase.idle
    assert host.verbs == UNDONE
    assert (host.kernel.active, host.kernel.loaded) == (False, False)


# Aborts


@pytest.mark.parametrize(("down", "force"), [(True, False), (True, True), (None, False)])
@in_virtual_time
async def test_an_abort_is_refused_while_the_host_goes_down(host: VirtualHost, down: bool | None, force: bool) -> None:
    engine = await executing(host, down)
    with pytest.raises(Refused, match="next kernel"):
        await engine.abort(force=force)
    assert nothing_undone(host)
    assert host.record.phase is Phase.executing
    assert (await engine.queries.status()).remedy


@pytest.mark.parametrize(("down", "force"), [(False, False), (None, True)])
@in_virtual_time
async def test_an_abort_puts_back_what_does_not_go_down(host: VirtualHost, down: bool | None, force: bool) -> None:
    engine = await executing(host, down)
    await engine.abort(force=force)
    await rolled_back(host, engine)


@in_virtual_time
async def test_a_request_that_comes_through_while_it_is_called_off_is_not_undone(host: VirtualHost) -> None:
    """systemctl still runs when abort asks; cut short, it has queued the job all the same."""
    host.shutdown = Systemd(False, True)
    engine = await host.started(orderly=hangs)
    handover = asyncio.ensure_future(host.kexec(engine))
    await host.seen(lambda event: event.phase is Phase.executing)
    with pytest.raises(KhoError):
        await engine.abort()
    with pytest.raises(NotRolledBack):
        await handover
    assert nothing_undone(host)


@in_virtual_time
async def test_whoever_asked_for_the_jump_is_answered_at_once(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd stops khod next, which waits two seconds for its answers to be taken."""
    engine = await executing(host, down=True)
    monkeypatch.setattr(engine._observer, "try_observe", hangs)
    monkeypatch.setattr(engine.queries, "_sighted_within", hangs)
    began = now()
    assert (await engine.queries.status()).phase is Phase.executing
    assert now() == began


# Requests that do not come back


@pytest.mark.parametrize("down", [False, None])
@in_virtual_time
async def test_systemctl_that_hangs_holds_no_abort(host: VirtualHost, down: bool | None) -> None:
    host.shutdown = Systemd(down)
    engine = await host.started(orderly=hangs)
    handover = asyncio.ensure_future(host.kexec(engine))
    await host.seen(lambda event: event.phase is Phase.executing)
    await engine.abort(force=down is None)
    with pytest.raises(KhoError):
        await handover
    assert now() == 0
    await rolled_back(host, engine)


@in_virtual_time
async def test_systemctl_that_hangs_is_given_up_where_the_host_does_not_go_down(host: VirtualHost) -> None:
    host.shutdown = Systemd(False)
    engine = await host.started(orderly=hangs)
    with pytest.raises(KhoError, match="did not come back within 90 s"):
        await host.kexec(engine)
    assert now() == EXECUTE
    await rolled_back(host, engine)


@pytest.mark.parametrize("down", [True, None])
@in_virtual_time
async def test_systemctl_that_hangs_is_watched_where_the_host_may_go_down(host: VirtualHost, down: bool | None) -> None:
    """And where it does not after all, everything is put back."""
    host.shutdown = asking = Systemd(down)
    engine = await host.started(orderly=hangs)
    with pytest.raises(NotRolledBack):
        await host.kexec(engine)
    assert nothing_undone(host)
    assert (await engine.queries.status()).phase is Phase.executing
    asking.answers = [False]
    await rolled_back(host, engine)


@in_virtual_time
async def test_a_shutdown_that_is_called_off_is_noticed(host: VirtualHost) -> None:
    engine = await executing(host, True)
    await asyncio.sleep(10 * EXECUTE)
    assert nothing_undone(host), "for as long as it goes down"
    host.shutdown.answers = [None]  # type: ignore[union-attr]
    await asyncio.sleep(10 * EXECUTE)
    assert nothing_undone(host), "nor where nobody can tell"
    host.shutdown.answers = [False]  # type: ignore[union-attr]
    began = now()
    await rolled_back(host, engine)
    assert now() - began <= EXECUTE
    assert "does not take the host down" in (await engine.queries.status()).last_error
    host.told.unlink()
    await engine.activate()


# reboot(2)


async def in_kernel(host: VirtualHost, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A khod whose reboot(2) has not come back within its deadline."""
    monkeypatch.setattr(host.kernel, "reboot_kexec", never)
    engine = await host.started()
    with pytest.raises(NotRolledBack, match="has not come back"):
        await host.kexec(engine)
    assert now() == EXECUTE
    assert nothing_undone(host)
    return engine


@in_virtual_time
async def test_nothing_is_undone_while_reboot_is_in_the_kernel(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await in_kernel(host, monkeypatch)
    for force in (False, True):
        with pytest.raises(Refused, match="cannot be called back"):
            await engine.abort(force=force)
    await engine.stop(jumping=False)
    assert nothing_undone(host)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM])
@in_virtual_time
async def test_reboot_that_fails_after_its_deadline_is_put_back(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    engine = await in_kernel(host, monkeypatch)
    monkeypatch.undo()
    host.kernel.set_fault("reboot_errno", number)
    worker = host.workers.kernel
    assert isinstance(worker, InlineWorker)
    worker.come_back()
    await rolled_back(host, engine)
    assert errno.errorcode[number] in (await engine.queries.status()).last_error


@in_virtual_time
async def test_sync_that_hangs_before_the_jump_is_no_jump(host: VirtualHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say whether the host goes down; but nobody was asked to take it down."""
    jump = shutdown.make_immediate(Kexec(host.kernel), host.workers, EXECUTE)
    engine = await host.started(orderly=jump)
    monkeypatch.setattr(host.kernel, "sync_disks", never)
    with pytest.raises(KhoError) as raised:
        await host.kexec(engine)
    assert "sync" in raised.value.what
    assert host.verbs == UNDONE
    assert engine.record.phase is Phase.idle, "the kernel's thread is free for the undo"


# Stops


@pytest.mark.parametrize("down", [True, None])
@in_virtual_time
async def test_a_stop_while_the_host_goes_down_undoes_nothing(host: VirtualHost, down: bool | None) -> None:
    engine = await executing(host, True)
    await engine.stop(jumping=down)
    assert nothing_undone(host)
    assert host.record.phase is Phase.executing


@in_virtual_time
async def test_a_stop_while_the_host_stays_puts_back(host: VirtualHost) -> None:
    engine = await executing(host, None)
    await engine.stop(jumping=False)
    await rolled_back(host, engine)


@in_virtual_time
async def test_a_khod_that_starts_while_the_host_goes_down_undoes_nothing(host: VirtualHost) -> None:
    """The one before it died after systemd had taken its request."""
    (await executing(host, True))._background.cancel_tasks()
    engine = host.engine()
    await engine.start()
    assert nothing_undone(host)
    assert engine.machine.phase is Phase.executing
    host.shutdown.answers = [False]  # type: ignore[union-attr]
    await rolled_back(host, engine)


STEPS = {
    "activate first": ["preparing", "freezing", "activating", "loading"],
    "load first": ["preparing", "loading", "freezing", "activating"],
}


@pytest.mark.parametrize(("order", "phase"), [(order, phase) for order, phases in STEPS.items() for phase in phases])
@in_virtual_time
async def test_a_stop_in_the_middle_of_a_step_while_the_host_jumps_ends_in_one_piece(
    host: VirtualHost, order: str, phase: str
) -> None:
    """Either everyone is frozen and the image has the state, or nothing is loaded and the host boots cold."""
    if order == "load first":
        driven_as(host, LoadFirst(host.kernel))
    a = host.hooks[0]
    assert isinstance(a, Scripted)

    async def slowly() -> None:
        await asyncio.sleep(1)

    a.does = {"prepare": slowly, "freeze": slowly}
    host.shutdown = Systemd(True)
    engine = await host.started(orderly=taken)
    handover = asyncio.ensure_future(host.kexec(engine))
    await host.seen(lambda event: event.phase.value == phase)
    await engine.stop(jumping=True)
    handover.cancel()
    await asyncio.wait({handover})
    if not host.kernel.loaded:
        assert host.verbs[-1:] == ["a cancel"]
        assert host.verbs.count("a freeze") == host.verbs.count("a thaw")
        return
    assert host.verbs == TOLD
    with pytest.raises(Rebooted):
        host.kernel.reboot_kexec()
    host.shutdown = None
    status = await (await host.started()).queries.status()
    assert status.outcome in (Phase.verified, Phase.degraded)
    assert "not every producer was frozen" not in status.last_error
