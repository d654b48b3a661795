# SPDX-License-Identifier: LGPL-2.1-or-later
"""The undo of an attempt, total and bounded: what one step or one producer does ends no other's undo.

The kernel's part comes first: the image is unloaded and the active phase left. It is not waited for any longer than
PATIENCE_SECONDS before the producers are thawed: a kernel call that hangs must keep nobody frozen.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from khod.concurrency.bounded import CUT_SECONDS, run_within
from khod.config import Deadlines
from khod.engine.attempt import Attempt
from khod.errors import KhoError
from khod.model import NotUndone, Step
from khod.producers.barrier import UNDO, Participant, Verb
from khod.producers.order import order_in_ranks

PATIENCE_SECONDS = 2.0
"""Seconds the kernel's undo goes ahead of the producers'."""
OVERHEAD_SECONDS = 10.0
"""Seconds for the record, the bus and the journal together."""
KERNEL = (Step.activate, Step.load)
PRODUCERS = {Step.freeze: Verb.freeze, Step.prepare: Verb.prepare}


@dataclass(frozen=True)
class Failure:
    """A step that could not be undone, or not for everyone."""

    step: Step
    items: tuple[NotUndone, ...]

    def describe(self) -> str:
        """What is not undone, and why."""
        return "; ".join(dict.fromkeys(item.why for item in self.items))


def bound_seconds(deadlines: Deadlines, producers: Iterable[Participant]) -> float:
    """The most that a rollback may take: the kernel's calls, two verbs of every rank, and the overhead."""
    slowest = sum(max(producer.timeout + CUT_SECONDS for producer in rank) for rank in order_in_ranks(producers))
    return len(KERNEL) * deadlines.rollback + len(UNDO) * slowest + OVERHEAD_SECONDS


async def undo_all(attempt: Attempt, done: Sequence[Step], emit: Callable[[str], None]) -> list[Failure]:
    """Undo these steps, the last first; those that could not be undone. Raises nothing but a cancellation."""
    kernel = asyncio.ensure_future(_undo_kernel(attempt, [step for step in reversed(done) if step in KERNEL], emit))
    await asyncio.wait({kernel}, timeout=PATIENCE_SECONDS)
    producers = await _undo_producers(attempt, [step for step in reversed(done) if step in PRODUCERS], emit)
    return [*await kernel, *producers]


async def _undo_kernel(attempt: Attempt, steps: Sequence[Step], emit: Callable[[str], None]) -> list[Failure]:
    undo = {Step.activate: attempt.undo_activate, Step.load: attempt.undo_load}
    failures: list[Failure] = []
    for step in steps:
        if failures:
            # The image has the state of the active phase. Left loaded without that phase it would hand stale state
            # over with the next reboot, of which systemd 262 makes a kexec.
            why, remedy = "the active phase is kept: the image that has its state is still loaded", ""
        else:
            try:
                await run_within(attempt.undo_seconds, undo[step]())
                continue
            except KhoError as error:
                why, remedy = _describe_error(error), error.remedy
            except Exception as error:  # noqa: BLE001 - one step's, whatever it is: the others go on
                why, remedy = f"khod itself failed: {error!r}", "This is a bug; the journal has more."
        if step is Step.load:
            remedy = f"{remedy} Do not reboot before: it would jump into this image with stale state.".strip()
        failures.append(Failure(step, (NotUndone(step.value, "", why, remedy),)))
        emit(f"{step.value} could not be undone: {why}")
    return failures


async def _undo_producers(attempt: Attempt, steps: Sequence[Step], emit: Callable[[str], None]) -> list[Failure]:
    failures: list[Failure] = []
    for step in steps:
        verb = PRODUCERS[step]
        try:
            failed = await attempt.undo_verb(verb)
        except Exception as error:  # noqa: BLE001 - as above
            failed = [("", KhoError(f"khod itself failed: {error!r}", remedy="This is a bug; the journal has more."))]
        if failed:
            items = tuple(
                NotUndone(
                    step.value,
                    name,
                    _describe_error(error),
                    f"Help {name}, or do it by hand." if name else error.remedy,
                )
                for name, error in failed
            )
            failures.append(Failure(step, items))
            emit(f"Not every producer could {UNDO[verb].value}: {failures[-1].describe()}")
    return failures


def _describe_error(error: KhoError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
