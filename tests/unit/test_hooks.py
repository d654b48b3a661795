"""Producers: the barrier's order and its undo, vetoes, deadlines; hooks that crash, fork, flood or never end."""

import asyncio
import os
import re
import select
from pathlib import Path

import pytest

from khod.errors import ConfigError, Refused
from khod.producers.barrier import Barrier, Telling, Verb, Veto, ranks
from khod.producers.hooks import PASSED_ON, Hook
from khod.record import Holder
from tests.unit.khods import run


def hook(script: str, *, timeout: float = 20.0, name: str = "a", after: tuple[str, ...] = ()) -> Hook:
    """A hook whose every verb runs one shell script."""
    verbs = ("prepare", "freeze", "thaw", "cancel")
    return Hook(name, timeout, after, commands={verb: ["/bin/sh", "-c", script] for verb in verbs})


class Rehearsed:
    """A producer in this process: notes what it is told; waits for `gate`, refuses what is in `refuses`."""

    kind = "rehearsed"
    timeout = 20.0
    devices = ()
    restores = False
    reachable = True

    def __init__(
        self, name: str, told: list[str], *, after: tuple[str, ...] = (), before: tuple[str, ...] = ()
    ) -> None:
        self.name, self.after, self.before = name, after, before
        self.refuses: set[Verb] = set()
        self.gate: asyncio.Event | None = None
        self._told = told

    async def returned(self) -> None:
        """It is here."""

    async def leave(self, note: str) -> None:
        """It stands in nobody's way."""

    def holder(self) -> Holder:
        return Holder(self.name, self.kind)

    async def tell(self, telling: Telling) -> None:
        self._told.append(f"{self.name} {telling.verb.value}")
        if self.gate is not None:
            await self.gate.wait()
        if telling.verb in self.refuses:
            raise Veto("not now")


def barrier(*producers: Rehearsed | Hook) -> Barrier:
    return Barrier.of(producers, "run-1", lambda _member: None)


async def test_ranks_pass_in_order_and_are_undone_in_reverse() -> None:
    told: list[str] = []
    first, last = Rehearsed("z-first", told, before=("m",)), Rehearsed("a-last", told, after=("m", "z-first"))
    here = barrier(last, Rehearsed("m", told), first)
    await here.tell(Verb.prepare)
    await here.tell(Verb.freeze)
    assert [word.split()[0] for word in told] == ["z-first", "m", "a-last"] * 2
    told.clear()
    await here.undo(Verb.freeze)
    await here.undo(Verb.prepare)
    expected = ["a-last thaw", "m thaw", "z-first thaw", "a-last cancel", "m cancel", "z-first cancel"]
    assert told == expected


async def test_within_a_rank_all_are_told_before_any_has_answered() -> None:
    told: list[str] = []
    gate = asyncio.Event()
    rank = [Rehearsed(name, told) for name in "abc"]
    for member in rank:
        member.gate = gate
    here = barrier(*rank)
    telling = asyncio.ensure_future(here.tell(Verb.prepare))
    for _turn in range(10):
        await asyncio.sleep(0)
    assert sorted(told) == ["a prepare", "b prepare", "c prepare"]
    assert all(member.waiting for member in here.members)
    gate.set()
    await telling
    assert not any(member.waiting for member in here.members)


async def test_no_rank_is_told_before_the_one_ahead_has_answered() -> None:
    told: list[str] = []
    slow = Rehearsed("a", told)
    slow.gate = asyncio.Event()
    here = barrier(slow, Rehearsed("b", told, after=("a",)))
    telling = asyncio.ensure_future(here.tell(Verb.prepare))
    for _turn in range(10):
        await asyncio.sleep(0)
    assert told == ["a prepare"]
    slow.gate.set()
    await telling
    assert told == ["a prepare", "b prepare"]


async def test_a_veto_ends_it_and_only_those_told_are_told_that_it_is_off() -> None:
    told: list[str] = []
    no = Rehearsed("b", told, after=("a",))
    no.refuses = {Verb.prepare}
    here = barrier(Rehearsed("a", told), no, Rehearsed("c", told, after=("b",)))
    with pytest.raises(Refused, match="not now") as raised:
        await here.tell(Verb.prepare)
    assert "b" in raised.value.where
    await here.undo(Verb.prepare)
    assert told == ["a prepare", "b prepare", "b cancel", "a cancel"], "b may have had half of it done"


async def test_an_undo_that_fails_does_not_keep_the_others_from_theirs_and_can_be_told_again() -> None:
    told: list[str] = []
    stuck = Rehearsed("b", told, after=("a",))
    stuck.refuses = {Verb.thaw}
    here = barrier(Rehearsed("a", told), stuck)
    await here.tell(Verb.prepare)
    await here.tell(Verb.freeze)
    told.clear()
    [(name, error)] = await here.undo(Verb.freeze)
    assert name == "b"
    assert "not now" in error.what
    assert told == ["b thaw", "a thaw"]
    told.clear()
    stuck.refuses = set()
    await here.undo(Verb.freeze)
    assert told == ["b thaw"], "a was thawed already"
    await here.undo(Verb.prepare)
    assert told == ["b thaw", "b cancel", "a cancel"]


def test_a_cycle_is_named() -> None:
    told: list[str] = []
    circle = [
        Rehearsed("a", told, after=("c",)),
        Rehearsed("b", told, after=("a",)),
        Rehearsed("c", told, after=("b",)),
    ]
    with pytest.raises(ConfigError) as raised:
        ranks(circle)
    assert all(name in raised.value.what for name in "abc")
    with pytest.raises(ConfigError):
        ranks([Rehearsed("self", told, after=("self",))])


def test_names_that_are_not_there_are_no_constraint() -> None:
    told: list[str] = []
    found = ranks([Rehearsed("a", told, after=("gone",)), Rehearsed("b", told, before=("gone",))])
    assert [[producer.name for producer in rank] for rank in found] == [["a", "b"]]
    assert ranks([]) == []


async def test_a_hook_knows_its_verb_and_its_run_and_little_else(tmp_path: Path) -> None:
    await hook(f"env > {tmp_path}/env; readlink /proc/self/fd/0 > {tmp_path}/stdin").tell(Telling(Verb.freeze, "run-1"))
    words = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert (words["KHO_VERB"], words["KHO_RUN"]) == ("freeze", "run-1")
    assert words.keys() - {"PWD", "SHLVL", "_", "OLDPWD"} == {"KHO_NAME", "KHO_VERB", "KHO_RUN", "PATH"}
    assert (tmp_path / "stdin").read_text() == "/dev/null\n"


async def test_a_verb_without_a_command_is_a_yes() -> None:
    await Hook("a", commands={"freeze": ["/bin/false"]}).tell(Telling(Verb.prepare, "run-1"))


VETOES = [
    ("echo first >&2; echo the reason >&2; exit 1", "the reason"),
    ("printf 'no newline' >&2; exit 3", "no newline"),
    ("echo reason >&2; echo >&2; exit 1", "reason"),
    ("exit 4", "4"),
    ("kill -SEGV $$", "SIGSEGV"),
    ("printf '\\377\\376' >&2; exit 1", "\ufffd"),
]


@pytest.mark.parametrize(("script", "reason"), VETOES)
async def test_a_hook_that_ends_otherwise_is_a_veto_with_its_last_line(script: str, reason: str) -> None:
    with pytest.raises(Veto, match=reason):
        await hook(script).tell(Telling(Verb.prepare, "run-1"))


async def test_a_reason_is_one_line_fit_for_a_terminal() -> None:
    with pytest.raises(Veto) as raised:
        await hook("printf '\\033[2Jgone\\a\\n' >&2; exit 1").tell(Telling(Verb.prepare, "run-1"))
    assert str(raised.value) == "?[2Jgone?"


async def test_a_hook_killed_by_a_real_time_signal_is_a_veto() -> None:
    with pytest.raises(Veto, match="40"):
        await hook("kill -40 $$").tell(Telling(Verb.prepare, "run-1"))


async def test_a_hook_that_cannot_be_started_is_a_veto(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("no interpreter line, no permission")
    for program in (tmp_path / "nowhere", tmp_path, tmp_path / "script"):
        with pytest.raises(Veto, match=re.escape(str(program))):
            await Hook("a", commands={"prepare": [str(program)]}).tell(Telling(Verb.prepare, "run-1"))


async def test_a_child_that_holds_standard_error_does_not_hold_the_barrier() -> None:
    here = barrier(hook("sleep 600 & exit 0", timeout=5))
    await here.tell(Verb.prepare)
    assert here.members[0].answer == "ready"


async def test_a_child_that_floods_standard_error_does_not_hold_the_barrier() -> None:
    here = barrier(hook("exec > /dev/null; (while :; do echo flood >&2; done) & exit 0", timeout=3))
    await here.tell(Verb.prepare)
    assert here.members[0].answer == "ready"


def gone(pid: int) -> bool:
    """Tell whether a process has ended; one that was just sent SIGKILL has a moment for it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 20)[0])
    finally:
        os.close(process)


async def test_at_the_deadline_the_whole_session_is_killed(tmp_path: Path) -> None:
    """A child left behind must not thaw later."""
    pids = tmp_path / "pids"
    late = hook(f"sleep 600 & echo $$ $! > {pids}; wait", timeout=0.5)
    with pytest.raises(Refused, match=r"0\.5 s"):
        await barrier(late).tell(Verb.freeze)
    assert [gone(int(pid)) for pid in pids.read_text().split()] == [True, True]


async def test_a_hook_that_ignores_signals_is_killed_too(tmp_path: Path) -> None:
    stubborn = hook(f"trap '' TERM INT HUP; echo $$ > {tmp_path}/pid; while :; do sleep 600; done", timeout=0.5)
    with pytest.raises(Refused):
        await barrier(stubborn).tell(Verb.freeze)
    assert gone(int((tmp_path / "pid").read_text()))


async def test_a_cancelled_barrier_kills_its_hooks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    telling = asyncio.ensure_future(barrier(hook(f"echo $$ > {fifo}; sleep 600")).tell(Verb.freeze))
    pid = int(await asyncio.to_thread(fifo.read_text))
    telling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await telling
    assert gone(pid)


async def test_a_hook_cancelled_while_it_is_spawned_leaves_no_child_behind(tmp_path: Path) -> None:
    """The command runs before the event loop has connected its pipes; an abort may fall in between."""
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    telling = asyncio.ensure_future(
        hook(f"sleep 600 & echo $$ $! > {tmp_path}/fifo; wait").tell(Telling(Verb.freeze, "r"))
    )
    for _turn in ("tell", "spawn"):  # to the spawn and not beyond
        await asyncio.sleep(0)
    assert select.select([fifo], [], [], 20)[0], "it runs; this loop has not turned since"
    pids = [int(pid) for pid in os.read(fifo, 100).split()]
    os.close(fifo)
    telling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await telling
    assert [gone(pid) for pid in pids] == [True, True]


ORPHANS = """
import asyncio, sys
from khod.producers.barrier import Telling, Verb
from khod.producers.hooks import Hook, adopt_orphans
adopt_orphans()
child = "setsid sleep 600 & echo $$ $! > {pids}; mv {pids} {done}; wait"
script = f"setsid sh -c '{{child}}' & until [ -e {done} ]; do :; done"
asyncio.run(Hook("a", commands={{"prepare": ["/bin/sh", "-c", script]}}).tell(Telling(Verb.prepare, "r")))
print("over")
"""


def test_a_child_that_leaves_the_session_is_killed_too(tmp_path: Path) -> None:
    done = tmp_path / "done"
    ended = run(["-c", ORPHANS.format(pids=tmp_path / "pids", done=done)])
    assert ended.out == "over\n", ended.err
    assert [gone(int(pid)) for pid in done.read_text().split()] == [True, True]


FLOOD = """
import asyncio, resource
from khod.producers.barrier import Telling, Verb
from khod.producers.hooks import Hook
size = {size}
script = f"head -c {{size}} /dev/zero | tee /dev/stderr; echo >&2; echo the end >&2; exit 1"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    asyncio.run(Hook("a", commands={{"prepare": ["/bin/sh", "-c", script]}}).tell(Telling(Verb.prepare, "r")))
except Exception as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_hook_that_prints_a_gibibyte_is_heard_to_its_end_and_not_kept() -> None:
    """The most of it reaches neither our memory nor the journal."""
    ended = run(["-c", FLOOD.format(size=1 << 30)])
    assert ended.code == 0
    grown, reason = ended.out.rstrip("\n").rpartition("\n")[2].split(" ", 1)
    assert reason == "the end"
    assert int(grown) < 16 << 10, "KiB"
    assert f"({(1 << 30) + 9 - PASSED_ON} bytes more were left out here)" in ended.err
    assert len(ended.err) < PASSED_ON + 1000
    assert PASSED_ON < len(ended.out) < PASSED_ON + 1000
