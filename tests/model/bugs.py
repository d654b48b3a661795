# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bugs that are planted to see whether the model finds them: one for each mechanism, and some more.

Each is a replacement of one function of khod's, under the name it has today: where khod is rewritten, this is too.
`rules` are those that matter, so that it is found soon; `invariants` are those it breaks.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import khod.handover.verify
import khod.server.producers
import khod.systemd.shutdown
from khod.engine.attempt import Attempt
from khod.engine.interruptions import Interruptions
from khod.engine.queries import Queries
from khod.handover.record import ProducerRecord, Record, Store
from khod.handover.session_names import session_of
from khod.kernel.protocol import Tree
from khod.model import Generation, Phase, Status, Verdict
from khod.producers.barrier import Barrier, Verb
from khod.producers.peers import Peers
from khod.producers.sessions import Sessions
from tests.model.invariants import INVARIANTS, Violation
from tests.model.machine import Count, example, quiet
from tests.model.process import PooledWorker
from tests.model.reduce import outcome, reduced
from tests.model.rules import RULES
from tests.model.script import written

WORK = ("activate", "kexec", "kexec_loaded", "load_only", "abort", "start", "go_on", "come")
EXAMPLES = 3000
"""Examples after which a bug counts as not found."""


@dataclass(frozen=True)
class Bug:
    """One planted bug: what is wrong, in place of what, and what tells it."""

    name: str
    mechanism: str
    what: str
    where: Any
    attribute: str
    make: Callable[[Any], Any]
    invariants: tuple[str, ...]
    rules: tuple[str, ...] = ()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have it in khod."""
        right = getattr(self.where, self.attribute)
        setattr(self.where, self.attribute, self.make(right))
        try:
            yield
        finally:
            setattr(self.where, self.attribute, right)


def _undo_that_swallows(right: Any) -> Any:
    async def undo(self: Attempt, verb: Verb) -> list[tuple[str, Exception]]:
        with suppress(Exception):
            await right(self, verb)
        return []

    return undo


def _call_off_that_forgets(right: Any) -> Any:
    def cancel(self: Interruptions, cause: Any) -> None:
        if not self._turn.is_taken:
            return
        right(self, cause)

    return cancel


def _expect_that_closes(right: Any) -> Any:
    def expect(self: Peers, holders: Any, run: str, *, restoring: bool) -> None:
        right(self, holders, run, restoring=restoring)
        for holder in holders:
            self._sessions.close_session(session_of(run, holder.name))

    return expect


def _holders_without_peers(right: Any) -> Any:
    def holders(self: Barrier) -> tuple[ProducerRecord, ...]:
        return tuple(holder for holder in right(self) if holder.kind != "varlink")

    return holders


def _status_of_the_kernel_alone(right: Any) -> Any:
    async def status(self: Queries) -> Status:
        found: Status = await right(self)
        hidden = found.phase in (Phase.degraded, Phase.foreign)
        phase = Phase.idle if hidden else found.phase
        return replace(found, phase=phase, outcome=Phase.idle, foreign=False, exit_code=0)

    return status


def _call_without_deadline(_right: Any) -> Any:
    async def call(
        self: PooledWorker, function: Callable[[], Any], _what: str, _deadline: float, _late: object = None
    ) -> Any:
        return await self._submit(function)

    return call


def _never_on_the_way(_right: Any) -> Any:
    async def on_the_way(_seconds: float = 0.0) -> bool:
        return False

    return on_the_way


def _close_that_leaks(_right: Any) -> Any:
    def close(self: Sessions, session: str) -> None:
        self._inodes.pop(session, None)
        if self._fds.pop(session, None) is not None:
            self._store.remove_fd(session)

    return close


def _text_as_it_comes(_right: Any) -> Any:
    return lambda text: text


def _write_without_sync(right: Any) -> Any:
    def write(self: Store, record: Record, *, durable: bool = True) -> None:  # noqa: ARG001 - this is the bug
        right(self, record, durable=False)

    return write


def _compare_that_finds_nothing(right: Any) -> Any:
    def compare(before: Tree | None, arrived: Tree | None, was: Generation, now: Generation) -> Verdict:
        found: Verdict = right(before, arrived, was, now)
        return replace(found, missing=[], changed=[]).with_findings([])

    return compare


BUGS = (
    Bug(
        "undo-that-raises-counts-as-done",
        "M1",
        "a thaw or an unload that fails is taken for one that was done",
        Attempt,
        "undo_verb",
        _undo_that_swallows,
        ("frozen_at_rest", "loaded_at_rest", "record_complete"),
        ("behave",),
    ),
    Bug(
        "event-under-way-is-forgotten",
        "M2",
        "a device that goes while khod waits for orders ends nothing",
        Interruptions,
        "cancel",
        _call_off_that_forgets,
        ("event_lost",),
        ("device",),
    ),
    Bug(
        "start-closes-what-arrived",
        "M3",
        "a session of the previous kernel is closed as khod starts",
        Peers,
        "expect_holders",
        _expect_that_closes,
        ("session_freed",),
        ("shutdown_goes_on",),
    ),
    Bug(
        "peers-are-not-recorded",
        "M4",
        "the record leaves out producers that connect",
        Barrier,
        "to_records",
        _holders_without_peers,
        ("record_complete", "claims_recorded"),
    ),
    Bug(
        "status-shows-the-kernel-alone",
        "M5",
        "a degraded boot, and somebody else's image, are shown as idle",
        Queries,
        "status",
        _status_of_the_kernel_alone,
        ("outcome_kept", "loaded_at_rest"),
        ("foreign_load", "next_jump"),
    ),
    Bug(
        "kernel-is-waited-for-without-bound",
        "M6",
        "a call to the kernel has no deadline",
        PooledWorker,
        "call_within",
        _call_without_deadline,
        ("abort_bound",),
        ("call_hangs",),
    ),
    Bug(
        "nobody-asks-whether-the-host-jumps",
        "M7",
        "a stop rolls back under systemd's own kexec",
        khod.systemd.shutdown,
        "kexec_job_pending",
        _never_on_the_way,
        ("kept_for_jump",),
        ("shutdown", "shutdown_goes_on"),
    ),
    Bug(
        "sessions-stay-open",
        "M8",
        "the descriptor of a session that is over is not closed",
        Sessions,
        "close_session",
        _close_that_leaks,
        ("bounded",),
    ),
    Bug(
        "a-reason-is-shown-as-it-came",
        "M9",
        "what a producer says reaches the terminal with its control characters",
        khod.server.producers,
        "one_line",
        _text_as_it_comes,
        ("printable",),
        ("behave",),
    ),
    Bug(
        "record-is-not-synced",
        "record",
        "the record is renamed before it is on the disk",
        Store,
        "write",
        _write_without_sync,
        ("record_readable",),
        ("power_loss",),
    ),
    Bug(
        "verified-whatever-arrived",
        "verdict",
        "what is missing or changed is not looked at",
        khod.handover.verify,
        "compare_trees",
        _compare_that_finds_nothing,
        ("verified",),
        ("next_jump",),
    ),
)
"""Every bug there is."""


def find(bug: Bug) -> str:
    """Plant a bug and look for it; what was found, "" where nothing was. It must not be there without the bug."""
    rules = [one for one in RULES if one.name in (*WORK, *bug.rules)]
    Count.known = frozenset(INVARIANTS.keys() - set(bug.invariants))
    generator = random.Random(bug.name)
    for number in range(1, EXAMPLES + 1):
        try:
            with bug.planted():
                example(generator, rules=rules)
        except Violation as violation:
            with bug.planted():
                setting, smallest = reduced(Count.setting, Count.log, Count.known)
            if outcome(setting, smallest, Count.known)[0]:
                continue  # that is wrong without the bug, too
            return f"found by {violation.name} in example {number}\n{written(setting, smallest)}"
    return ""


def find_all() -> bool:
    """Look for each, and tell; whether all were found."""
    all_found = True
    with quiet():
        for bug in BUGS:
            began = time.perf_counter()
            found = find(bug)
            all_found = all_found and bool(found)
            took = time.perf_counter() - began
            sys.stdout.write(f"{bug.mechanism} {bug.name} ({bug.what}), {took:.1f} s: {found or 'NOT FOUND'}\n")
            sys.stdout.flush()
    return all_found
