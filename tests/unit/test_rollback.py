# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rollback is total: whatever raises in the middle of it, or leads to it, is one step's failure and ends nothing."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest

from khod.engine import Engine, rollback
from khod.errors import Exit, KhoError, NotRolledBack
from khod.model import Phase, Step
from tests.unit.harness import ACTIVE, Host
from tests.unit.scripted import Scripted, raises

ERRORS = [
    OSError(errno.EMFILE, "Too many open files", "/dev/null"),
    ValueError("embedded null byte"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    asyncio.CancelledError(),
]
"""What is none of khod's own errors; the last is a cancellation that nobody asked for."""

PREPARED = ["a prepare", "b prepare", "c prepare"]
FROZEN = ["a freeze", "b freeze", "c freeze"]
UNDONE = ["c thaw", "b thaw", "a thaw", "c cancel", "b cancel", "a cancel"]


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def error(request: pytest.FixtureRequest) -> BaseException:
    raised: BaseException = request.param
    return raised


def three(host: Host, **b_does: Any) -> Scripted:
    """Three producers in a row; the one in the middle, which is returned, does something else than it is told."""
    Scripted(host, "a")
    b = Scripted(host, "b", after=("a",), **b_does)
    Scripted(host, "c", after=("b",))
    return b


def once(original: Callable[..., Any], error: BaseException, when: Callable[..., bool]) -> Callable[..., Any]:
    """Stand for a function that raises the first time `when` its arguments say so."""
    due = [error]

    def call(*arguments: Any, **named: Any) -> Any:
        if due and when(*arguments, **named):
            raise due.pop()
        return original(*arguments, **named)

    return call


async def put_back(host: Host, engine: Engine) -> None:
    """Nothing is held anywhere, by khod or for it, and the next handover goes on."""
    status = await engine.queries.status()
    assert (status.phase, status.exit_code, status.done) == (Phase.idle, Exit.done, [])
    assert not host.kernel.active
    assert not host.kernel.loaded
    assert not host.guard.watching
    host.told.unlink(missing_ok=True)
    await engine.activate()
    await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]


@pytest.mark.parametrize("undo", ["thaw", "cancel"])
async def test_an_undo_that_raises_keeps_no_other_from_its_undo(host: Host, undo: str, error: BaseException) -> None:
    b = three(host, **{undo: raises(error)})
    engine = await host.started()
    await engine.activate()
    with pytest.raises(NotRolledBack, match="b"):
        await engine.abort()
    due = [verb for verb in UNDONE if verb != "b cancel" or undo == "cancel"]
    assert host.verbs == [*PREPARED, *FROZEN, *due]
    status = await engine.queries.status()
    assert (status.phase, status.kernel_active) == (Phase.failed, False)
    assert {item.producer for item in status.not_undone} == {"b"}

    b.does.clear()
    await engine.abort()
    told = ["b thaw", "b cancel"] if undo == "thaw" else ["b cancel"]
    assert host.verbs == [*PREPARED, *FROZEN, *due, *told], "it is told again, and nobody else is"
    await put_back(host, engine)


@pytest.mark.parametrize("undo", ["thaw", "cancel"])
async def test_an_undo_that_raises_does_not_end_a_khod_that_starts(host: Host, undo: str, error: BaseException) -> None:
    b = three(host, **{undo: raises(error)})
    await (await host.started()).activate()
    engine = host.engine()
    with pytest.raises(NotRolledBack, match="b"):
        await engine.start()
    assert {f"{name} thaw" for name in "abc"} <= set(host.verbs)
    b.does.clear()
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.failed, "and the next one knows it still"
    await engine.abort()
    await put_back(host, engine)


@pytest.mark.parametrize("verb", ["prepare", "freeze"])
async def test_a_producer_that_raises_is_a_veto(host: Host, verb: str, error: BaseException) -> None:
    b = three(host, **{verb: raises(error)})
    engine = await host.started()
    with pytest.raises(KhoError, match="b"):
        await engine.activate()
    assert host.verbs[-2:] == ["b cancel", "a cancel"]
    b.does.clear()
    await put_back(host, engine)


KERNEL: dict[str, tuple[str, Callable[..., bool]]] = {
    "entering the active phase": ("write_file", lambda path, data: (path, data) == (ACTIVE, b"1\n")),
    "reading the tree": ("read_file", lambda path: path.endswith("/kho/dt")),
    "loading the image": ("kexec_file_load", lambda *given: not given[3] & 1),
    "the jump": ("reboot_kexec", lambda: True),
    "sync(2) before it": ("sync_disks", lambda: True),
}


@pytest.mark.parametrize("what", KERNEL)
async def test_whatever_the_kernel_s_calls_raise_is_put_back(host: Host, what: str, error: BaseException) -> None:
    three(host)
    engine = await host.started()
    name, when = KERNEL[what]
    setattr(host.kernel, name, once(getattr(host.kernel, name), error, when))
    with pytest.raises(KhoError):
        await host.kexec(engine)
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    await put_back(host, engine)


KERNEL_UNDO: dict[str, tuple[str, Callable[..., bool]]] = {
    "activate": ("write_file", lambda path, data: (path, data) == (ACTIVE, b"0\n")),
    "load": ("kexec_file_load", lambda *given: bool(given[3] & 1)),
}


@pytest.mark.parametrize("what", KERNEL_UNDO)
async def test_a_kernel_call_that_raises_in_the_undo_keeps_nobody_frozen(
    host: Host, what: str, error: BaseException
) -> None:
    three(host)
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    name, when = KERNEL_UNDO[what]
    setattr(host.kernel, name, once(getattr(host.kernel, name), error, when))
    with pytest.raises(NotRolledBack):
        await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    status = await engine.queries.status()
    assert status.phase is Phase.failed
    assert what in status.left
    await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    await put_back(host, engine)


@pytest.mark.parametrize("phase", ["preparing", "freezing", "activating", "active"])
async def test_a_record_that_cannot_be_written_on_the_way_is_put_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, phase: str, error: BaseException
) -> None:
    """Also the last one, of where the handover then waits."""
    three(host)
    engine = await host.started()
    write = once(type(host.store).write, error, lambda _store, record, **_more: record.phase.value == phase)
    monkeypatch.setattr(type(host.store), "write", write)
    with pytest.raises(KhoError) as raised:
        await engine.activate()
    assert raised.value.exit is Exit.failed
    await put_back(host, engine)


async def test_a_record_that_can_no_longer_be_written_keeps_nobody_frozen(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    three(host)
    engine = await host.started()
    await engine.activate()
    with monkeypatch.context() as full:

        def refuse(*_arguments: object, **_more: object) -> None:
            raise error

        full.setattr(type(host.store), "write", refuse)
        await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    await put_back(host, engine)


async def test_a_step_that_is_held_and_cannot_be_recorded_is_put_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """What --hold keeps must be what the record says."""
    three(host)
    engine = await host.started()
    await engine.activate()
    host.kernel.set_fault("load_errno", errno.ENOMEM)
    write = once(type(host.store).write, error, lambda _store, record, **_more: record.phase is Phase.active)
    monkeypatch.setattr(type(host.store), "write", write)
    with pytest.raises(KhoError):
        await host.kexec(engine, hold=True)
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    await put_back(host, engine)


@pytest.mark.parametrize("error", ERRORS[:-1], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["start", "process_pending"])
async def test_a_guard_that_raises_is_put_back(host: Host, call: str, error: Exception) -> None:
    three(host)
    setattr(host.guard, call, once(getattr(host.guard, call), error, lambda *_given: True))
    engine = await host.started()
    with pytest.raises(KhoError):
        await engine.activate()
    await put_back(host, engine)


@pytest.mark.parametrize("error", ERRORS[:-1], ids=lambda error: type(error).__name__)
async def test_a_guard_that_cannot_be_stopped_hides_no_rollback(host: Host, error: Exception) -> None:
    three(host)
    engine = await host.started()
    await engine.activate()
    host.guard.stop = once(host.guard.stop, error, lambda: True)  # type: ignore[method-assign]
    await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]


async def test_a_listener_that_fails_ends_no_rollback(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    three(host)

    def refuse(_event: object) -> None:
        raise error

    monkeypatch.setattr(host, "_tell", refuse)
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    assert host.verbs == [*PREPARED, *FROZEN, *UNDONE]
    await put_back(host, engine)


@pytest.mark.parametrize("order", [[Step.activate, Step.load], [Step.load, Step.activate]])
async def test_an_image_is_unloaded_although_the_active_phase_cannot_be_left(order: list[Step]) -> None:
    """Where the image was loaded first (6.19 and later) its undo is the last, and depends on nothing before it."""

    class Kernel:
        undo_seconds = 5.0
        is_unloaded = False

        async def undo_activate(self) -> None:
            raise KhoError("it is kept")

        async def undo_load(self) -> None:
            self.is_unloaded = True

    kernel = Kernel()
    failures = await rollback._undo_kernel(kernel, order, lambda _text: None)  # type: ignore[arg-type]
    assert kernel.is_unloaded
    assert [failure.step for failure in failures] == [Step.activate]
