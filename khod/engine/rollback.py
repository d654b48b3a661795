# SPDX-License-Identifier: LGPL-2.1-or-later
"""The undo of an attempt, complete and bounded: a failure of one step or producer ends no other's undo.

The kernel's part comes first: the image is unloaded and the active phase left. After PATIENCE_SECONDS the producers are
thawed even if that has not ended: a kernel call that hangs must keep no producer frozen.
"""

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from khod.concurrency.bounded import CUT_SECONDS, run_within
from khod.config import Deadlines
from khod.dataclass import dataclass
from khod.engine.attempt import Attempt
from khod.errors import KhoError
from khod.model import NotUndone, Step
from khod.producers.barrier import UNDO, Participant, Verb
from khod.producers.order import order_in_ranks
from khod.quiesce.outcome import Started
from khod.text import join_names

PATIENCE_SECONDS = 2.0
"""Maximum seconds that the producers' undo waits for the kernel's."""
OVERHEAD_SECONDS = 10.0
"""Seconds for the record, the bus and the journal together."""
KERNEL = (Step.activate, Step.load)
PRODUCERS = {Step.freeze: Verb.freeze, Step.prepare: Verb.prepare}
RESTARTED = "started again; they have lost their connections and what they had in memory"


@dataclass(frozen=True)
class Failure:
    """A step that could not be undone, or not for every producer."""

    step: Step
    items: tuple[NotUndone, ...]

    def describe(self) -> str:
        """Return why it is not undone, each reason once."""
        whys = (f"{item.producer}: {item.why}" if self.step is Step.quiesce else item.why for item in self.items)
        return "; ".join(dict.fromkeys(whys))


def bound_seconds(deadlines: Deadlines, producers: Iterable[Participant], quiesce_seconds: float = 0.0) -> float:
    """Return the maximum seconds of a rollback: the kernel's calls, two verbs of every rank, and the overhead.

    `quiesce_seconds` is the maximum for starting again what was stopped, 0 where nothing is.
    """
    slowest = sum(max(producer.timeout + CUT_SECONDS for producer in rank) for rank in order_in_ranks(producers))
    return len(KERNEL) * deadlines.rollback + len(UNDO) * slowest + quiesce_seconds + OVERHEAD_SECONDS


async def undo_all(attempt: Attempt, done: Sequence[Step], emit: Callable[[str], None]) -> list[Failure]:
    """Undo these steps, the last first; return those that could not be undone. Raises nothing except a cancellation."""
    kernel = asyncio.ensure_future(_undo_kernel(attempt, [step for step in reversed(done) if step in KERNEL], emit))
    await asyncio.wait({kernel}, timeout=PATIENCE_SECONDS)
    failures: list[Failure] = []
    for step in reversed(done):
        if step in PRODUCERS:
            failures += await _undo_members(partial(attempt.undo_verb, PRODUCERS[step]), step, emit)
        elif step is Step.quiesce:
            failures += await _undo_quiesce(attempt, emit)
    failures = [*await kernel, *failures]
    return [*failures, *await _undo_leaders(attempt, failures, emit)] if Step.prepare in done else failures


async def _undo_leaders(attempt: Attempt, failures: Sequence[Failure], emit: Callable[[str], None]) -> list[Failure]:
    """Have the leaders release what they hold, at the end; not before the rest is undone: the host is not steady."""
    if not failures:
        return await _undo_members(partial(attempt.barrier.undo_verb, Verb.prepare, leaders=True), Step.prepare, emit)
    held = [member.producer.name for member in attempt.barrier.leaders if member.told in UNDO]
    why = "the lock is kept until the rest is undone"
    return [Failure(Step.prepare, (NotUndone(Step.prepare.value, name, why, ""),)) for name in held]


async def _undo_quiesce(attempt: Attempt, emit: Callable[[str], None]) -> list[Failure]:
    names = attempt.stopped_units
    try:
        started = await attempt.start_host()
    except Exception as error:  # noqa: BLE001 - any error of one step: the others continue
        started = Started(dict.fromkeys(names, f"khod itself failed: {error!r}"))
    failed, left = started.failed, started.left
    if running := [name for name in names if name not in failed and name not in left]:
        emit(f"{join_names(running)}: {RESTARTED}")
    if left:
        emit(f"Not running again: {join_names(f'{name} ({why})' for name, why in left.items())}")
    if not failed:
        return []
    remedy = f"Run: systemctl start {shlex.join(failed)}."  # names have backslashes
    items = tuple(NotUndone(Step.quiesce.value, name, why, remedy) for name, why in failed.items())
    emit(f"Not every unit could be started again: {join_names(f'{name} ({why})' for name, why in failed.items())}")
    return [Failure(Step.quiesce, items)]


async def _undo_kernel(attempt: Attempt, steps: Sequence[Step], emit: Callable[[str], None]) -> list[Failure]:
    undo = {Step.activate: attempt.undo_activate, Step.load: attempt.undo_load}
    failures: list[Failure] = []
    for step in steps:
        if failures and step is Step.activate:
            # The image contains the state of the active phase. If it stayed loaded without that phase, it would hand
            # over stale state at the next reboot, because systemd 262 makes a kexec of that.
            why, remedy = "the active phase is kept: the image that has its state is still loaded", ""
        else:
            try:
                await run_within(attempt.undo_seconds, undo[step]())
                continue
            except KhoError as error:
                why, remedy = _describe_error(error), error.remedy
            except Exception as error:  # noqa: BLE001 - any error of one step: the others continue
                why, remedy = f"khod itself failed: {error!r}", "This is a bug; the journal has more."
        if step is Step.load:
            remedy = f"{remedy} Do not reboot before: it would jump into this image with stale state.".strip()
        failures.append(Failure(step, (NotUndone(step.value, "", why, remedy),)))
        emit(f"{step.value} could not be undone: {why}")
    return failures


async def _undo_members(
    undo: Callable[[], Awaitable[list[tuple[str, KhoError]]]], step: Step, emit: Callable[[str], None]
) -> list[Failure]:
    verb = PRODUCERS[step]
    try:
        failed = await undo()
    except Exception as error:  # noqa: BLE001 - as above
        failed = [("", KhoError(f"khod itself failed: {error!r}", remedy="This is a bug; the journal has more."))]
    if not failed:
        return []
    items = tuple(
        NotUndone(step.value, name, _describe_error(error), f"Help {name}, or do it by hand." if name else error.remedy)
        for name, error in failed
    )
    failure = Failure(step, items)
    emit(f"Not every producer could {UNDO[verb].value}: {failure.describe()}")
    return [failure]


def _describe_error(error: KhoError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
