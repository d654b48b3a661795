# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rollback is bounded: what hangs, in the kernel, on a disk or in a producer, keeps no other from its undo."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khod.concurrency.bounded import CUT_SECONDS
from khod.config import Config, Deadlines
from khod.engine import Engine
from khod.engine.cancellation import INTERRUPT_SECONDS
from khod.engine.rollback import PATIENCE_SECONDS
from khod.errors import Failed, KhoError, NotRolledBack
from khod.kernel.host import SECURE_BOOT
from khod.model import Phase, Step
from tests.unit.harness import ACTIVE, UNLOAD
from tests.unit.scripted import Scripted, deaf, hangs
from tests.unit.virtual import InlineWorker, VirtualHost, in_virtual_time, never, now

AT_ONCE = 0.0
TOLD = ["a prepare", "b prepare", "a freeze", "b freeze"]
UNDONE = ["b thaw", "a thaw", "b cancel", "a cancel"]


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    made = VirtualHost(tmp_path)
    made.config = Config(deadlines=Deadlines(rollback=30.0, observe=1.0))
    return made


def two(host: VirtualHost) -> tuple[Scripted, Scripted]:
    return Scripted(host, "a", timeout=20), Scripted(host, "b", after=("a",), timeout=5)


def come_back(worker: object) -> None:
    """Let what hung in a worker come back."""
    assert isinstance(worker, InlineWorker)
    worker.come_back()


async def undone(engine: Engine, *, fails: bool = False) -> float:
    """Seconds an abort takes; NotRolledBack where it `fails`."""
    began = now()
    if fails:
        with pytest.raises(NotRolledBack):
            await engine.abort()
    else:
        await engine.abort()
    return now() - began


# Producers


@in_virtual_time
async def test_a_thaw_that_sleeps_in_the_kernel_is_waited_for_no_longer_than_its_deadline(host: VirtualHost) -> None:
    """`a` froze the file system that `b` writes to when it is thawed: only a's thaw would wake it."""
    _, b = two(host)
    engine = await host.started()
    await engine.activate()
    b.does["thaw"] = deaf()
    assert await undone(engine, fails=True) == b.timeout + CUT_SECONDS
    assert host.verbs[4:] == ["b thaw", "a thaw", "a cancel"]
    status = await engine.queries.status()
    assert (status.phase, status.kernel_active) == (Phase.failed, False)
    assert [item.producer for item in status.not_undone] == ["b"]
    assert await undone(engine, fails=True) == b.timeout + CUT_SECONDS
    b.does.clear()
    assert await undone(engine) == AT_ONCE
    assert host.verbs[-2:] == ["b thaw", "b cancel"]


@pytest.mark.parametrize("verb", ["prepare", "freeze"])
@in_virtual_time
async def test_a_producer_that_cannot_be_cut_short_is_a_veto_at_its_deadline(host: VirtualHost, verb: str) -> None:
    _, b = two(host)
    b.does[verb] = deaf()
    engine = await host.started()
    with pytest.raises(KhoError, match="b"):
        await engine.activate()
    assert now() == b.timeout + CUT_SECONDS
    assert host.verbs[-1] == "a cancel"
    assert engine.machine.phase is Phase.idle


@pytest.mark.parametrize("what", ["hangs", "is deaf"])
@in_virtual_time
async def test_an_abort_cuts_what_a_producer_does_short(host: VirtualHost, what: str) -> None:
    _, b = two(host)
    b.does["freeze"] = hangs if what == "hangs" else deaf()
    b.timeout = 60
    engine = await host.started()
    activation = asyncio.ensure_future(engine.activate())
    await host.seen(lambda event: event.message.startswith("b: freeze"))
    assert await undone(engine) <= (AT_ONCE if what == "hangs" else INTERRUPT_SECONDS)
    with pytest.raises(Failed):
        await activation
    assert host.verbs == [*TOLD, *UNDONE]


@pytest.mark.parametrize("verb", ["restore", "finish"])
@in_virtual_time
async def test_a_restore_that_sleeps_in_the_kernel_does_not_keep_the_others_from_theirs(
    host: VirtualHost, verb: str
) -> None:
    """And this boot is not verified for ever, where an abort would be refused."""
    a, b = Scripted(host, "a", restores=True), Scripted(host, "b", after=("a",), restores=True)
    await host.jump()
    a.does[verb] = deaf()
    engine = await host.started()
    while engine.machine.phase is Phase.verifying:
        await host.seen(lambda _event: True)
    assert engine.machine.phase is Phase.degraded
    verdict = (await engine.queries.status()).verdict
    assert verdict is not None
    assert verdict.missing == ["a"]
    assert b.name in verdict.arrived


# The kernel


@in_virtual_time
async def test_a_failed_unload_keeps_the_active_phase_that_the_image_s_state_is_of(host: VirtualHost) -> None:
    two(host)
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    host.kernel.set_fault("unload_errno", 1)
    assert await undone(engine, fails=True) == AT_ONCE
    assert (host.kernel.active, host.kernel.loaded) == (True, True)
    assert host.verbs == [*TOLD, *UNDONE]
    status = await engine.queries.status()
    assert "reboot" in status.remedy
    assert status.left == [Step.activate.value, Step.load.value]


def hang_at(host: VirtualHost, hung: pytest.MonkeyPatch, name: str, when: Callable[..., bool]) -> None:
    """Have one of the kernel's calls not come back."""
    original = getattr(host.kernel, name)
    hung.setattr(host.kernel, name, lambda *given: never() if when(*given) else original(*given))


UNDO: dict[str, tuple[str, Callable[..., bool]]] = {
    "load": ("kexec_file_load", lambda *given: bool(given[3] & UNLOAD)),
    "activate": ("write_file", lambda path, data: (path, data) == (ACTIVE, b"0\n")),
}


@pytest.mark.parametrize("step", UNDO)
@in_virtual_time
async def test_an_undo_that_hangs_in_the_kernel_delays_no_thaw(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    two(host)
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    with monkeypatch.context() as hung:
        hang_at(host, hung, *UNDO[step])
        abort = asyncio.ensure_future(undone(engine, fails=True))
        while "a cancel" not in host.verbs:
            await host.seen(lambda _event: True)
        assert now() == PATIENCE_SECONDS
        assert await abort == host.config.deadlines.rollback
    assert host.kernel.active, "it is left only behind the image that has its state"
    status = await engine.queries.status()
    assert (status.phase, step in status.left) == (Phase.failed, True)
    come_back(host.workers.kernel)
    assert await undone(engine) == AT_ONCE
    assert (host.kernel.active, host.kernel.loaded) == (False, False)
    assert host.verbs == [*TOLD, *UNDONE]


@pytest.mark.parametrize("step", ["load", "activate"])
@in_virtual_time
async def test_an_abort_cuts_a_kernel_call_short_that_hangs(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What it asked for may still happen, and is put back when the kernel has come back."""
    two(host)
    engine = await host.started()
    with monkeypatch.context() as hung:
        hung.setattr(host.kernel, {"load": "kexec_file_load", "activate": "write_file"}[step], never)
        handover = asyncio.ensure_future(host.kexec(engine))
        await host.seen(lambda event: event.phase is {"load": Phase.loading, "activate": Phase.activating}[step])
        assert await undone(engine, fails=True) == host.config.deadlines.rollback
        with pytest.raises(NotRolledBack):
            await handover
        assert host.verbs == [*TOLD, *UNDONE]
    come_back(host.workers.kernel)
    assert await undone(engine) == AT_ONCE
    assert (host.kernel.active, host.kernel.loaded) == (False, False)


# Questions


@in_virtual_time
async def test_a_question_to_the_kernel_that_hangs_keeps_nobody_frozen(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(host)
    engine = await host.started()
    await engine.activate()
    monkeypatch.setattr(type(host.kernel), "loaded", property(never))
    monkeypatch.setattr("khod.kernel.kexec.Kexec.kernel_release", never)
    assert await undone(engine) == host.config.deadlines.observe
    assert host.verbs == [*TOLD, *UNDONE]


@pytest.mark.parametrize("stop", [False, True])
@in_virtual_time
async def test_a_check_that_hangs_keeps_nobody_frozen(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    """Anyone may ask for one: of an EFI variable, or of a driver's file below /sys."""
    two(host)
    engine = await host.started()
    await engine.activate()
    read, exists = host.kernel.read_file, host.kernel.path_exists
    monkeypatch.setattr(host.kernel, "path_exists", lambda path: path == SECURE_BOOT or exists(path))
    monkeypatch.setattr(host.kernel, "read_file", lambda path: never() if path == SECURE_BOOT else read(path))
    check = asyncio.ensure_future(engine.queries.check())
    await asyncio.sleep(0)
    await (engine.stop(jumping=False) if stop else engine.abort())
    assert now() == AT_ONCE
    assert host.verbs == [*TOLD, *UNDONE]
    with pytest.raises(Failed):
        await check


HANGING: dict[str, Callable[[VirtualHost, pytest.MonkeyPatch], None]] = {
    "its image lies on a file system that hangs": lambda _host, hung: hung.setattr(os, "preadv", never),
    "sync(2) hangs": lambda host, hung: hung.setattr(host.kernel, "sync_disks", never),
    "the kernel does not say how it stands": lambda _host, hung: hung.setattr(
        "khod.kernel.kexec.Kexec.kernel_release", never
    ),
    "a check hangs": lambda _host, hung: hung.setattr("khod.preflight.run_checks", never),
    "the record cannot be written": lambda host, hung: hung.setattr(type(host.store), "write", never),
}


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("what", HANGING)
@in_virtual_time
async def test_an_abort_cuts_a_handover_short_that_waits_for_what_hangs(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, what: str, stop: bool
) -> None:
    two(host)
    engine = await host.started()
    await engine.activate()
    HANGING[what](host, monkeypatch)
    with host.request() as request:
        handover = asyncio.ensure_future(engine.kexec(replace(request, now=True)))
        await asyncio.sleep(1)
        began = now()
        await (engine.stop(jumping=False) if stop else engine.abort())
        assert now() - began <= 10, "the record and the question how it stands have their own bounds"
        with pytest.raises(Failed):
            await handover
    assert host.verbs == [*TOLD, *UNDONE]
    assert (host.kernel.active, host.kernel.loaded) == (False, False)


# The bound


@in_virtual_time
async def test_a_rollback_takes_no_longer_than_the_plan_says(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that can hang hanging at once, and the producers in as many ranks as there are."""
    producers = [Scripted(host, name, after=after, timeout=7) for name, after in zip("abcd", ((), *"abc"), strict=True)]
    engine = await host.started()
    with host.request(load_only=True) as request:
        plan = await engine.queries.plan(request)
        await engine.kexec(request)
    for producer in producers:
        producer.does.update(thaw=deaf(), cancel=deaf())
    for owner, call in ((host.kernel, "kexec_file_load"), (host.kernel, "write_file"), (type(host.store), "write")):
        monkeypatch.setattr(owner, call, never)
    monkeypatch.setattr("khod.kernel.kexec.Kexec.kernel_release", never)
    assert await undone(engine, fails=True) <= plan.rollback_seconds
    assert [verb for verb in host.verbs if "thaw" in verb] == ["d thaw", "c thaw", "b thaw", "a thaw"]
