# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers: the barrier's order and its undo, vetoes, deadlines; hooks that crash, fork, flood or never end."""

import asyncio
import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from khod.errors import ConfigError, Exit, Refused
from khod.handover.record import ProducerRecord
from khod.producers.barrier import Barrier, ParticipantVeto, ProducerCall, Verb
from khod.producers.hooks import Hook
from khod.producers.identity import process_of, wait_ended
from khod.producers.order import order_in_ranks
from khod.producers.output import PASSED_ON_BYTES, PASSED_ON_LINES
from tests.unit.hung import frozen_file_system, silent_file_system
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, run, until, wait_readable


def hook(script: str, *, timeout: float = 20.0, name: str = "a", after: tuple[str, ...] = ()) -> Hook:
    """A hook whose every verb runs one shell script."""
    verbs = ("prepare", "freeze", "thaw", "cancel")
    return Hook(name, timeout, after, commands={verb: ["/bin/sh", "-c", script] for verb in verbs})


class Rehearsed:
    """A producer in this process: notes what it is told; waits for `gate`, refuses what is in `refuses`."""

    kind = "rehearsed"
    timeout = 20.0
    devices = ()
    units = ()
    restores_state = False
    is_reachable = True

    def __init__(
        self, name: str, told: list[str], *, after: tuple[str, ...] = (), before: tuple[str, ...] = ()
    ) -> None:
        self.name, self.after, self.before = name, after, before
        self.refuses: set[Verb] = set()
        self.gate: asyncio.Event | None = None
        self._told = told

    async def wait_returned(self) -> None:
        """It is here."""

    async def make_way(self, note: str) -> None:
        """It stands in nobody's way."""

    def to_record(self) -> ProducerRecord:
        return ProducerRecord(self.name, self.kind)

    async def carry_out(self, telling: ProducerCall) -> None:
        self._told.append(f"{self.name} {telling.verb.value}")
        if self.gate is not None:
            await self.gate.wait()
        if telling.verb in self.refuses:
            raise ParticipantVeto("not now")


def barrier(*producers: Rehearsed | Hook) -> Barrier:
    return Barrier.from_producers(producers, "run-1", lambda _member: None)


async def test_ranks_pass_in_order_and_are_undone_in_reverse() -> None:
    told: list[str] = []
    first, last = Rehearsed("z-first", told, before=("m",)), Rehearsed("a-last", told, after=("m", "z-first"))
    here = barrier(last, Rehearsed("m", told), first)
    await here.broadcast(Verb.prepare)
    await here.broadcast(Verb.freeze)
    assert [word.split()[0] for word in told] == ["z-first", "m", "a-last"] * 2
    told.clear()
    await here.undo_verb(Verb.freeze)
    await here.undo_verb(Verb.prepare)
    expected = ["a-last thaw", "m thaw", "z-first thaw", "a-last cancel", "m cancel", "z-first cancel"]
    assert told == expected


async def test_within_a_rank_all_are_told_before_any_has_answered() -> None:
    told: list[str] = []
    gate = asyncio.Event()
    rank = [Rehearsed(name, told) for name in "abc"]
    for member in rank:
        member.gate = gate
    here = barrier(*rank)
    telling = asyncio.ensure_future(here.broadcast(Verb.prepare))
    for _turn in range(10):
        await asyncio.sleep(0)
    assert sorted(told) == ["a prepare", "b prepare", "c prepare"]
    assert all(member.is_waiting for member in here.members)
    gate.set()
    await telling
    assert not any(member.is_waiting for member in here.members)


async def test_no_rank_is_told_before_the_one_ahead_has_answered() -> None:
    told: list[str] = []
    slow = Rehearsed("a", told)
    slow.gate = asyncio.Event()
    here = barrier(slow, Rehearsed("b", told, after=("a",)))
    telling = asyncio.ensure_future(here.broadcast(Verb.prepare))
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
        await here.broadcast(Verb.prepare)
    assert "b" in raised.value.where
    await here.undo_verb(Verb.prepare)
    assert told == ["a prepare", "b prepare", "b cancel", "a cancel"], "b may have had half of it done"


async def test_an_undo_that_fails_does_not_keep_the_others_from_theirs_and_can_be_told_again() -> None:
    told: list[str] = []
    stuck = Rehearsed("b", told, after=("a",))
    stuck.refuses = {Verb.thaw}
    here = barrier(Rehearsed("a", told), stuck)
    await here.broadcast(Verb.prepare)
    await here.broadcast(Verb.freeze)
    told.clear()
    [(name, error)] = await here.undo_verb(Verb.freeze)
    assert name == "b"
    assert "not now" in error.what
    assert told == ["b thaw", "a thaw"]
    told.clear()
    stuck.refuses = set()
    await here.undo_verb(Verb.freeze)
    assert told == ["b thaw"], "a was thawed already"
    await here.undo_verb(Verb.prepare)
    assert told == ["b thaw", "b cancel", "a cancel"]


def test_a_cycle_is_named() -> None:
    told: list[str] = []
    circle = [
        Rehearsed("a", told, after=("c",)),
        Rehearsed("b", told, after=("a",)),
        Rehearsed("c", told, after=("b",)),
    ]
    with pytest.raises(ConfigError) as raised:
        order_in_ranks(circle)
    assert all(name in raised.value.what for name in "abc")
    with pytest.raises(ConfigError):
        order_in_ranks([Rehearsed("self", told, after=("self",))])


def test_names_that_are_not_there_are_no_constraint() -> None:
    told: list[str] = []
    found = order_in_ranks([Rehearsed("a", told, after=("gone",)), Rehearsed("b", told, before=("gone",))])
    assert [[producer.name for producer in rank] for rank in found] == [["a", "b"]]
    assert order_in_ranks([]) == []


async def test_a_hook_knows_its_verb_and_its_run_and_little_else(tmp_path: Path) -> None:
    await hook(f"env > {tmp_path}/env; readlink /proc/self/fd/0 > {tmp_path}/stdin").carry_out(
        ProducerCall(Verb.freeze, "run-1")
    )
    words = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert (words["KHO_VERB"], words["KHO_RUN"]) == ("freeze", "run-1")
    assert words.keys() - {"PWD", "SHLVL", "_", "OLDPWD"} == {"KHO_NAME", "KHO_VERB", "KHO_RUN", "PATH"}
    assert (tmp_path / "stdin").read_text() == "/dev/null\n"


async def test_a_verb_without_a_command_is_a_yes() -> None:
    await Hook("a", commands={"freeze": ["/bin/false"]}).carry_out(ProducerCall(Verb.prepare, "run-1"))


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
    with pytest.raises(ParticipantVeto, match=reason):
        await hook(script).carry_out(ProducerCall(Verb.prepare, "run-1"))


async def test_a_reason_is_one_line_fit_for_a_terminal() -> None:
    with pytest.raises(ParticipantVeto) as raised:
        await hook("printf '\\033[2Jgone\\a\\n' >&2; exit 1").carry_out(ProducerCall(Verb.prepare, "run-1"))
    assert str(raised.value) == "?[2Jgone?"


async def test_a_hook_killed_by_a_real_time_signal_is_a_veto() -> None:
    with pytest.raises(ParticipantVeto, match="40"):
        await hook("kill -40 $$").carry_out(ProducerCall(Verb.prepare, "run-1"))


async def test_a_hook_that_cannot_be_started_is_a_veto(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("no interpreter line, no permission")
    for program in (tmp_path / "nowhere", tmp_path, tmp_path / "script"):
        with pytest.raises(ParticipantVeto, match=re.escape(str(program))):
            await Hook("a", commands={"prepare": [str(program)]}).carry_out(ProducerCall(Verb.prepare, "run-1"))


def test_what_no_command_can_be_is_named_before_anyone_is_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("no program")
    named = ["sh", "/bin/sh", "no-such-command", "/no/such/command", str(tmp_path), str(data)]
    found = Hook("a", 20.0, commands={str(verb): [command] for verb, command in enumerate(named)})
    assert [text.split()[0] for text in found.unstartable_commands()] == named[2:]


async def test_a_child_that_holds_standard_error_does_not_hold_the_barrier() -> None:
    here = barrier(hook("sleep 600 & exit 0", timeout=5))
    await here.broadcast(Verb.prepare)
    assert here.members[0].answer == "ready"


async def test_a_child_that_floods_standard_error_does_not_hold_the_barrier() -> None:
    here = barrier(hook("exec > /dev/null; (while :; do echo flood >&2; done) & exit 0", timeout=3))
    await here.broadcast(Verb.prepare)
    assert here.members[0].answer == "ready"


def gone(pid: int) -> bool:
    """Tell whether a process has ended; one that was just sent SIGKILL has a moment for it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return wait_readable(process, 20)
    finally:
        os.close(process)


async def test_at_the_deadline_the_whole_session_is_killed(tmp_path: Path) -> None:
    """A child left behind must not thaw later."""
    pids = tmp_path / "pids"
    late = hook(f"sleep 600 & echo $$ $! > {pids}; wait", timeout=2.0)
    with pytest.raises(Refused, match="2 s"):
        await barrier(late).broadcast(Verb.freeze)
    assert [gone(int(pid)) for pid in pids.read_text().split()] == [True, True]


async def test_a_hook_that_ignores_signals_is_killed_too(tmp_path: Path) -> None:
    stubborn = hook(f"trap '' TERM INT HUP; echo $$ > {tmp_path}/pid; while :; do sleep 600; done", timeout=2.0)
    with pytest.raises(Refused):
        await barrier(stubborn).broadcast(Verb.freeze)
    assert gone(int((tmp_path / "pid").read_text()))


async def test_a_cancelled_barrier_kills_its_hooks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    telling = asyncio.ensure_future(barrier(hook(f"echo $$ > {fifo}; sleep 600")).broadcast(Verb.freeze))
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
        hook(f"sleep 600 & echo $$ $! > {tmp_path}/fifo; wait").carry_out(ProducerCall(Verb.freeze, "r"))
    )
    for _turn in ("tell", "spawn"):  # to the spawn and not beyond
        await asyncio.sleep(0)
    assert wait_readable(fifo, 20), "it runs; this loop has not turned since"
    pids = [int(pid) for pid in os.read(fifo, 100).split()]
    os.close(fifo)
    telling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await telling
    assert [gone(pid) for pid in pids] == [True, True]


ORPHANS = """
import asyncio, sys
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.children import adopt_orphans
from khod.producers.hooks import Hook
adopt_orphans()
child = "setsid sleep 600 & echo $$ $! > {pids}; mv {pids} {done}; wait"
script = f"setsid sh -c '{{child}}' & until [ -e {done} ]; do :; done"
asyncio.run(Hook("a", commands={{"prepare": ["/bin/sh", "-c", script]}}).carry_out(ProducerCall(Verb.prepare, "r")))
print("over")
"""


def test_a_child_that_leaves_the_session_is_killed_too(tmp_path: Path) -> None:
    done = tmp_path / "done"
    ended = run(["-c", ORPHANS.format(pids=tmp_path / "pids", done=done)])
    assert ended.out == "over\n", ended.err
    assert [gone(int(pid)) for pid in done.read_text().split()] == [True, True]


FLOOD = """
import asyncio, resource
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.hooks import Hook
from khod.producers.output import flush_outlets
size = {size}
script = f"head -c {{size}} /dev/zero | tee /dev/stderr; echo >&2; echo the end >&2; exit 1"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    asyncio.run(Hook("a", commands={{"prepare": ["/bin/sh", "-c", script]}}).carry_out(ProducerCall(Verb.prepare, "r")))
except Exception as error:
    flush_outlets()  # its thread writes to the same pipe: a print could fall into the middle of a line
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_hook_that_prints_a_gibibyte_is_heard_to_its_end_and_not_kept() -> None:
    """The most of it reaches neither our memory nor the journal."""
    ended = run(["-c", FLOOD.format(size=1 << 30)])
    assert ended.code == 0
    grown = re.search(r"^(\d+) the end$", ended.out, re.MULTILINE)
    assert grown is not None
    assert int(grown[1]) < 16 << 10, "KiB"
    assert f"({(1 << 30) + 9 - PASSED_ON_BYTES} bytes more were left out here)" in ended.err
    assert len(ended.err) < PASSED_ON_BYTES + 1000
    assert PASSED_ON_BYTES < len(ended.out) < PASSED_ON_BYTES + 1000


SHORT_LINES = """
import asyncio
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.hooks import Hook
script = "yes | head -c 400000"
asyncio.run(Hook("a", commands={"prepare": ["/bin/sh", "-c", script]}).carry_out(ProducerCall(Verb.prepare, "r")))
"""


def test_many_short_lines_leave_the_journal_room_for_other_messages() -> None:
    """Each line is an entry of its own, and journald counts entries."""
    ended = run(["-c", SHORT_LINES])
    lines = ended.out.splitlines()
    assert lines.count("a: prepare: y") == PASSED_ON_LINES
    assert lines[-1] == f"a: prepare: ({400_000 - 2 * PASSED_ON_LINES} bytes more were left out here)"


# Whatever goes wrong


async def vetoed(producer: Hook, verb: Verb = Verb.thaw) -> str:
    with pytest.raises(ParticipantVeto) as raised:
        await producer.carry_out(ProducerCall(verb, "r"))
    reason = str(raised.value)
    assert reason.isprintable()
    return reason


async def test_an_argument_that_no_command_can_have_is_a_veto() -> None:
    for argument in ("a\0b", "\ud800"):
        assert "/bin/echo cannot be started" in await vetoed(Hook("a", commands={"thaw": ["/bin/echo", argument]}))


async def test_an_undo_that_cannot_be_started_keeps_nobody_from_theirs(tmp_path: Path) -> None:
    """It is told again by the next abort, and not forgotten."""
    scripts = {name: hook(f"echo {name} >> {tmp_path}/told", name=name) for name in "ab"}
    broken = Hook("c", after=("b",), commands={"thaw": ["/bin/echo", "a\0b"]})
    here = barrier(*scripts.values(), broken)
    await here.broadcast(Verb.freeze)
    for _again in range(2):
        [(name, error)] = await here.undo_verb(Verb.freeze)
        assert name == "c"
        assert "/bin/echo cannot be started" in error.what
    told = (tmp_path / "told").read_text().split()
    assert sorted(told[2:]) == ["a", "b"], "the thaw of each, once"


async def test_a_hook_needs_no_new_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At TasksMax= there is none."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    await hook(f"echo words; touch {tmp_path}/done").carry_out(ProducerCall(Verb.thaw, "r"))
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EAGAIN, "TasksMax="), (errno.ENOMEM, "memory"), (errno.EMFILE, "LimitNOFILE=")]
)
async def test_what_the_host_lacks_is_said(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert words in await vetoed(hook("exit 0"))


async def test_a_surprise_is_a_veto_and_no_end_of_the_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def surprise(_hook: Hook, _telling: ProducerCall) -> None:
        raise KeyError("what nobody expected")

    monkeypatch.setattr(Hook, "_carry_out", surprise)
    assert "what nobody expected" in await vetoed(hook("exit 0"))


SCARCE = """
import asyncio, os, resource
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import adopt_orphans
from khod.producers.hooks import Hook
async def tell():
    try:
        await Hook("a", commands={"thaw": ["/bin/true"]}).carry_out(ProducerCall(Verb.thaw, "r"))
        return "done"
    except ParticipantVeto as veto:
        return str(veto)
async def main():
    adopt_orphans()
    print(await tell())
    before, most = os.listdir("/proc/self/fd"), resource.getrlimit(resource.RLIMIT_NOFILE)
    for few in range(3, max(map(int, before)) + 16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most[1]))
        print(await tell())
    resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert os.listdir("/proc/self/fd") == before
    print(await tell())
    try:
        print(os.waitpid(-1, 0))
    except ChildProcessError:
        print("no child is left")
asyncio.run(main())
"""


def test_with_every_number_of_descriptors_it_is_done_or_a_veto() -> None:
    ended = run(["-c", SCARCE])
    said = ended.out.splitlines()
    assert said[-1:] == ["no child is left"], ended
    assert said[0] == said[-2] == "done"
    assert said.count("done") > 2, "the last ones were enough"
    for reason in {*said} - {"done", said[-1]}:
        assert "too many files open" in reason, reason


@pytest.mark.parametrize("again", [0, 1, 3])
async def test_wherever_a_hook_is_cancelled_nothing_of_it_is_left(tmp_path: Path, again: int) -> None:
    """At every turn of the event loop up to where it waits for the command, and `again` in the turns after."""
    pids = tmp_path / "pids"
    endless = hook(f"sleep 600 & echo $$ $! >> {pids}; sleep 600")
    gc.collect()  # earlier tests' files are not to be closed meanwhile
    tasks, descriptors = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
    for turn in range(8):
        telling = asyncio.ensure_future(endless.carry_out(ProducerCall(Verb.freeze, "r")))
        for _turn in range(turn):
            await asyncio.sleep(0)
        for _time in range(1 + again):
            telling.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({telling})
        assert telling.cancelled()
        assert asyncio.all_tasks() == tasks
        assert len(os.listdir("/proc/self/fd")) == descriptors
    if pids.exists():
        assert all(gone(int(pid)) for pid in pids.read_text().split())


# What does not die


async def test_a_hook_that_sleeps_in_the_kernel_is_left_to_itself_and_named(tmp_path: Path) -> None:
    """Its own storage is frozen: SIGKILL does not end it before the one who froze that is told to thaw."""
    reasons: list[str] = []
    telling = ProducerCall(Verb.thaw, "r", "", lambda reason, _progress: reasons.append(reason))
    with frozen_file_system(tmp_path / "mnt") as frozen:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await Hook("db", commands={"thaw": ["touch", str(frozen / "log")]}).carry_out(telling)
        found = re.fullmatch(
            r"process (\d+) \(touch\) was sent SIGKILL: it sleeps in the kernel and does not die", reasons[-1]
        )
        assert found, reasons
        process = process_of(int(found[1]))
        assert process is not None
    await wait_ended(process)
    while process_of(process.pid) == process:  # noqa: ASYNC110 - its exit status is taken in a turn of this loop
        await asyncio.sleep(0)


UNDEAD = """
import asyncio
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import adopt_orphans
from khod.producers.hooks import Hook
async def main():
    adopt_orphans()
    # Its own exit code says what became of it; what it leaves behind is said too.
    script = "touch {log} & until grep -q ' D ' /proc/$!/stat; do :; done; echo not now >&2; exit {code}"
    try:
        await Hook("db", commands={{"thaw": ["/bin/sh", "-c", script]}}).carry_out(ProducerCall(Verb.thaw, "r"))
        print("done")
    except ParticipantVeto as veto:
        print(veto)
asyncio.run(main())
"""


@pytest.mark.parametrize(("code", "said"), [(0, "done"), (1, "not now; process ")])
def test_what_a_hook_leaves_asleep_in_the_kernel_is_named_too(tmp_path: Path, code: int, said: str) -> None:
    with frozen_file_system(tmp_path / "mnt") as frozen:
        ended = run(["-c", UNDEAD.format(log=frozen / "log", code=code)])
    assert ended.out.startswith(said), ended
    assert re.search(r"db thaw: process \d+ \(touch\) .* sleeps in the kernel and does not die", ended.err)


SILENT = """
import asyncio
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.hooks import Hook
async def main():
    try:
        async with asyncio.timeout(0.5):
            await Hook("a", commands={{"thaw": ["{command}"]}}).carry_out(ProducerCall(Verb.thaw, "r"))
    except TimeoutError:
        print("over")
asyncio.run(main())
"""


def test_a_command_on_a_file_system_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    """Whoever vforks stands still until the child has executed it."""
    with silent_file_system(tmp_path / "mnt") as silent:
        ended = run(["-c", SILENT.format(command=silent / "thaw")])
    assert ended.out == "over\n", ended.err


@pytest.mark.parametrize("name", ["a=b", "-x", "plain"])
async def test_a_command_of_any_name_is_run_as_it_is(tmp_path: Path, name: str) -> None:
    script = tmp_path / name
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" > "${0%/*}/said"\n')
    script.chmod(0o755)
    await Hook("a", commands={"thaw": [str(script), "--", "A=1", ""]}).carry_out(ProducerCall(Verb.thaw, "r"))
    assert (tmp_path / "said").read_text() == f"{script}\n--\nA=1\n\n"


# Where its words go

DEAF = """
import asyncio, os, sys
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.hooks import Hook
async def main():
    script = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2; touch {done}"
    await Hook("a", commands={{"thaw": ["/bin/sh", "-c", script]}}).carry_out(ProducerCall(Verb.thaw, "r"))
asyncio.run(main())
"""


@pytest.mark.parametrize("to", [">&-", "> /dev/full", "> >(:)", "> >(exec sleep 600)", "< /dev/null"])
def test_output_that_cannot_be_passed_on_harms_no_hook(tmp_path: Path, to: str) -> None:
    """Closed, full, gone, not read, not writable: standard output and error alike."""
    done = tmp_path / "done"
    with subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" 1{to} 2{to}', sys.executable, DEAF.format(done=done)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    ) as process:
        try:
            assert process.wait(DEADLINE) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert done.exists()


UNREAD = """
import asyncio, sys
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.hooks import Hook
async def main():
    for turn in range(8):
        hook = Hook("a", commands={"thaw": ["/bin/sh", "-c", "yes %s | head -c 1000000" % ("y" * 999)]})
        await hook.carry_out(ProducerCall(Verb.thaw, "r"))
    print("told", file=sys.stderr, flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


def test_what_nobody_reads_for_too_long_is_dropped_and_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stderr.readline() == b"told\n", "eight times, and nobody has read a word"
        read = b""
        while not (found := re.search(rb"\n\(khod dropped (\d+) bytes .*\)\n", read[-200:])):
            chunk = os.read(process.stdout.fileno(), 1 << 20)
            assert chunk, "it ended before it said what it dropped"
            read += chunk
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
        read += process.stdout.read()
    line = b"a: thaw: " + b"y" * 999 + b"\n"
    assert read.count(line) * len(line) + int(found[1]) == 8 * 1000 * len(line)
    assert read.count(b"khod dropped") == 1


def test_a_khod_whose_journal_is_gone_thaws_all_the_same(tmp_path: Path) -> None:
    """journald was killed: what it held of the streams is lost, and writing says EPIPE from then on."""
    frozen = tmp_path / "frozen"
    at = tmp_path / "root/etc/kho/producers.d"
    at.mkdir(parents=True)
    script = f"echo thawing; echo still >&2; rm {frozen}; echo thawed"
    (at / "a.toml").write_text(f'freeze = ["touch", "{frozen}"]\nthaw = ["/bin/sh", "-c", "{script}"]\n')
    khod = Deaf(tmp_path)
    try:
        assert khod.khoctl("activate").code == Exit.done
        os.close(khod.journal)
        assert khod.khoctl("abort").code == Exit.done
        assert not frozen.exists()
    finally:
        khod.close()


class Deaf(Khod):
    """A khod whose standard output goes into a pipe, which has one reader: `journal`."""

    def __init__(self, directory: Path) -> None:
        self.journal, self._writer = os.pipe()
        super().__init__(directory)
        os.close(self._writer)

    def command(self) -> list[str]:
        return ["sh", "-c", f'exec "$0" "$@" > /proc/{os.getpid()}/fd/{self._writer}', *super().command()]


# Orphans

LEAVES_BEHIND = {
    "daemon": "setsid env -i sh -c ': > {left}; exec sleep 0.1' &",
    "orphans-of-its-own": "setsid env -i sh -c ': > {left}; (sleep 0.1 &); exec sleep 0.2' &",
    "twice-removed": "(setsid env -i sh -c 'setsid sh -c \": > {left}; sleep 0.1\" & exit 0' &);",
}


@pytest.mark.parametrize("kind", LEAVES_BEHIND)
def test_whatever_a_hook_leaves_behind_is_reaped_when_it_ends(tmp_path: Path, kind: str) -> None:
    """In a session and an environment of its own, as sudo or a daemon: it is not known to be the hook's."""
    at, left = tmp_path / "root/etc/kho/producers.d", tmp_path / "left"
    at.mkdir(parents=True)
    script = f"{LEAVES_BEHIND[kind].format(left=left)} until [ -e {left} ]; do :; done; exit 0"
    (at / "d.toml").write_text(f"thaw = {json.dumps(['/bin/sh', '-c', script])}\n")
    khod = Khod(tmp_path)
    try:
        assert khod.khoctl("producers", "test", "d").code == Exit.done
        children = Path(f"/proc/{khod.process.pid}/task/{khod.process.pid}/children")
        until(lambda: not children.read_text(), khod.process)
    finally:
        khod.close()


OTHERS = """
import asyncio, subprocess, threading
from khod.producers.barrier import ProducerCall, Verb
from khod.producers.children import adopt_orphans
from khod.producers.hooks import Hook
def refuse(thread):
    raise RuntimeError("can't start new thread")
async def main():
    adopt_orphans()
    threading.Thread.start = refuse
    told = ProducerCall(Verb.thaw, "r")
    orphan = Hook("a", commands={"thaw": ["/bin/sh", "-c", "setsid env -i true & exit 0"]})
    theirs = [subprocess.Popen(["/bin/sh", "-c", f"exit {code}"]) for code in (3, 4)]
    ours = [
        await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {5 + new}", start_new_session=bool(new))
        for new in (0, 1)
    ]
    for turn in range(10):
        await orphan.carry_out(told)
    print(*[process.wait() for process in theirs], *[await process.wait() for process in ours])
asyncio.run(main())
"""


def test_no_exit_status_is_taken_from_whoever_waits_for_it() -> None:
    """Of asyncio's children too, which are waited for without a thread."""
    ended = run(["-c", OTHERS])
    assert ended.out == "3 4 5 6\n", ended.err
    assert "already read" not in ended.err
