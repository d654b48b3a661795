# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs by QMP, against a server that behaves as QEMU does, and in every way in which it should not."""

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from qemu.qmp import QMPClient

from khod.errors import ConfigError, Refused
from khod.handover.record import ProducerRecord
from khod.producers import qemu
from khod.producers.barrier import Barrier, Participant, ParticipantVeto, ProducerCall, Verb
from khod.producers.hooks import Hook
from khod.producers.identity import process_of
from khod.producers.peers import Peers
from khod.producers.qemu import UNFIT_STATES, Qemu
from khod.producers.registry import ProducerRegistry
from khod.producers.sessions import Sessions
from khod.vm import monitor
from khod.vm.monitor import PAUSED_STATE, RUNNING_STATES
from tests.unit.conftest import DEADLINE

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\n'
HANG_UP = b"hang up"
SILENCE = b"silence"
RUN_STATES = {
    *("debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate"),
    *("restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a process that lives less time to end than it has elsewhere."""
    monkeypatch.setattr(qemu, "GRACE_SECONDS", 0.05)


class Vm:
    """QEMU's QMP: one client is greeted, commands are carried out in turn, an answer goes to whoever is there by then.

    `instead` has what is said in place of the answer to a command, `once` the same for the next such command,
    `gates` what a command waits for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = "running"
        self.greeting = GREETING
        self.instead: dict[str, bytes] = {}
        self.once: dict[str, bytes] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.pauses_to = PAUSED_STATE
        self.heard: list[str] = []
        self.accepted = self.clients = 0
        self.noise: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._here: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()
        self._commands: asyncio.Queue[tuple[asyncio.StreamWriter, dict[str, Any]]] = asyncio.Queue()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something of the clients or the commands; the test's deadline bounds it."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.clients += 1
        self._changed.set()
        try:
            async with self._turn:
                self._here = writer
                self.say(self.greeting)
                decoder, text = json.JSONDecoder(), ""
                while chunk := await reader.read(1 << 16):
                    text += chunk.decode()
                    while text:
                        command, end = decoder.raw_decode(text)
                        text = text[end:]
                        self._commands.put_nowait((writer, command))
                self._here = None
        except ConnectionError:
            self._here = None
        finally:
            writer.close()
            self.clients -= 1
            self._changed.set()

    async def dispatch(self) -> None:
        while True:
            writer, command = await self._commands.get()
            if writer is not self._here:
                continue  # its client has left
            name = command["execute"]
            self.heard.append(name)
            self._changed.set()
            if gate := self.gates.get(name):
                await gate.wait()
            words = self.once.pop(name, None) or self.instead.get(name)
            self.say(words or self.carry_out(name, command.get("id")))

    def carry_out(self, name: str, number: str | None) -> bytes:
        value: dict[str, Any] = {}
        if name == "query-status":
            value = {"status": self.state, "running": self.state == "running"}
        elif name == "stop" and self.state in RUNNING_STATES:
            self.state = self.pauses_to
        elif name == "cont" and self.state == PAUSED_STATE:
            self.state = "running"
        answer = {"return": value} if number is None else {"return": value, "id": number}
        return b'{"event": "NOISE", "data": {}}\n' * (number is not None) + json.dumps(answer).encode() + b"\n"

    def say(self, words: bytes) -> None:
        if self._here is None or words == SILENCE:
            return
        if words == HANG_UP:
            self._here.close()
        else:
            self._here.write(words.replace(b"NUMBER", b"__qmp#%05d" % (len(self.heard) - 2)))

    def commands(self) -> list[str]:
        """What was heard since it was asked last, without what every connection begins with."""
        heard, self.heard = self.heard, []
        return [name for name in heard if name not in ("qmp_capabilities", "query-status")]


@asynccontextmanager
async def vm(path: Path) -> AsyncIterator[Vm]:
    """Give a server. At the end no client is connected, no task is left, and nobody said that one failed unseen."""
    here = Vm(path / "qmp")
    before = asyncio.all_tasks()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: here.noise.append(context))
    server = await asyncio.start_unix_server(here.serve, here.path)
    dispatcher = asyncio.ensure_future(here.dispatch())
    try:
        yield here
        await turns(3)  # a connection may be about to be accepted
        await here.until(lambda: here.clients == 0)
    finally:
        server.close()
        dispatcher.cancel()
        await asyncio.wait({dispatcher})
    assert asyncio.all_tasks() == before
    gc.collect()
    assert not here.noise


async def turns(count: int) -> None:
    for _turn in range(count):
        await asyncio.sleep(0)


def told(verb: Verb, note: str = "") -> tuple[ProducerCall, list[str]]:
    """A telling, and the reasons why it is not yet done."""
    reasons: list[str] = []
    return ProducerCall(verb, "run-1", note, lambda reason, _progress: reasons.append(reason)), reasons


async def tell(where: Path, verb: Verb, note: str = "") -> str:
    """Tell a VM and give the note it leaves."""
    telling, _ = told(verb, note)
    await Qemu("vm", socket=str(where)).carry_out(telling)
    return telling.note


async def veto(where: Path, verb: Verb, note: str = "") -> str:
    """Give the reason of a veto, which is one short line."""
    with pytest.raises(ParticipantVeto) as raised:
        await tell(where, verb, note)
    reason = str(raised.value)
    assert reason
    assert len(reason) < 400
    assert reason.isprintable()
    return reason


def identity_of(pid: int) -> str:
    process = process_of(pid)
    assert process is not None
    return f"{process.pid} {process.started}"


@contextmanager
def other() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a process that ends with its standard input, and give its pid and start."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process, identity_of(process.pid)


def ours() -> str:
    """Pid and start of this process, which is the one that listens."""
    return identity_of(os.getpid())


def prepared(process: str, reached: str = "asked", state: str = "running") -> str:
    return f"{reached} {state} {process}"


async def test_a_running_vm_is_paused_from_freeze_to_thaw(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        note = await tell(here.path, Verb.prepare)
        assert (here.state, here.commands()) == ("running", [])
        assert note == f"prepared running {ours()} {here.path}"
        note = await tell(here.path, Verb.freeze, note)
        assert (here.state, here.commands()) == ("paused", ["stop"])
        note = await tell(here.path, Verb.thaw, note)
        assert (here.state, here.commands()) == ("running", ["cont"])
        await tell(here.path, Verb.thaw, note)
        assert (here.state, here.commands()) == ("running", []), "thawed already"


async def test_a_vm_that_its_operator_paused_stays_paused(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.state = PAUSED_STATE
        note = await tell(here.path, Verb.freeze, await tell(here.path, Verb.prepare))
        await tell(here.path, Verb.thaw, note)
        assert (here.state, here.commands()) == (PAUSED_STATE, [])


async def test_a_suspended_vm_is_paused_where_stop_does_that(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.state = "suspended"
        note = await tell(here.path, Verb.freeze, await tell(here.path, Verb.prepare))
        assert here.commands() == ["stop"]
        await tell(here.path, Verb.thaw, note)
        assert here.commands() == ["cont"]
        here.state = here.pauses_to = "suspended"
        note = await tell(here.path, Verb.prepare)
        assert "asked to pause, it is `suspended`" in await veto(here.path, Verb.freeze, note)
        await tell(here.path, Verb.thaw, prepared(ours(), state="suspended"))
        assert here.state == "suspended"


def test_every_run_state_is_judged() -> None:
    assert UNFIT_STATES.keys() | RUNNING_STATES | {PAUSED_STATE} == RUN_STATES


@pytest.mark.parametrize("state", [*UNFIT_STATES, "preconfig", "a\x1b[31m\nline" * 100])
async def test_states_that_are_not_handed_over_are_a_veto_with_a_reason(tmp_path: Path, state: str) -> None:
    async with vm(tmp_path) as here:
        here.state = state
        reason = await veto(here.path, Verb.prepare)
        assert UNFIT_STATES.get(state, "not a state that khod knows") in reason
        assert here.commands() == []


async def test_cancel_and_the_verbs_of_the_next_kernel_ask_nobody(tmp_path: Path) -> None:
    for verb in (Verb.cancel, Verb.restore, Verb.finish):
        await tell(tmp_path / "gone", verb, prepared(ours()))


NO_GREETING = [
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"{}\n",
    b"[]\n",
    b"\n",
    b'{"QMP": 1}\n',
    b'{"QMP": {"version": [], "capabilities": []}}\n',
    b'{"event": "STOP"}\n',
    b"\xff\xfe\x00\n",
    b"[" * 100_000 + b"\n",
    b"x" * (11 << 20),
    b'{"QMP": ' + b"9" * 20_000 + b"}\n",
]


@pytest.mark.parametrize("greeting", NO_GREETING, ids=lambda words: repr(words[:20]))
async def test_whoever_does_not_greet_as_qmp_does_is_a_veto(tmp_path: Path, greeting: bytes) -> None:
    async with vm(tmp_path) as here:
        here.greeting = greeting
        assert "what it says is not QMP (at its greeting)" in await veto(here.path, Verb.prepare)


async def test_pretty_qmp_is_named(tmp_path: Path) -> None:
    """qemu(1), -qmp-pretty; the library reads a message to the end of its line."""
    async with vm(tmp_path) as here:
        pretty = json.dumps(json.loads(GREETING), indent=4).encode().replace(b"\n", b"\r\n") + b"\r\n"
        here.greeting = pretty
        assert "pretty=on" in await veto(here.path, Verb.prepare)
        here.greeting = GREETING
        here.instead["query-status"] = b'{\r\n    "return": {\r\n    }\r\n}\r\n'
        assert "pretty=on" in await veto(here.path, Verb.prepare)


async def test_a_server_that_hangs_up_before_its_greeting_or_after_it_is_a_veto(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.greeting = HANG_UP
        assert "it closed the QMP connection" in await veto(here.path, Verb.prepare)
        here.greeting = GREETING
        here.instead["qmp_capabilities"] = HANG_UP
        assert "it closed the QMP connection" in await veto(here.path, Verb.prepare)


async def test_a_negotiation_that_fails_twice_is_a_veto_and_one_that_fails_once_is_not(tmp_path: Path) -> None:
    """The first may have been the answer to another client's command."""
    async with vm(tmp_path) as here:
        here.instead["qmp_capabilities"] = b'{"error": {"class": "GenericError", "desc": "a dump is in progress"}}\n'
        assert "not QMP" in await veto(here.path, Verb.prepare)
        assert here.heard == ["qmp_capabilities"] * 2
        here.once["qmp_capabilities"] = here.instead.pop("qmp_capabilities")
        await tell(here.path, Verb.prepare)


async def test_the_late_answer_to_another_client_is_not_taken_for_ours(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.instead["qmp_capabilities"] = b'{"return": {}, "id": "__qmp#00001"}\n{"return": {}}\n'
        note = await tell(here.path, Verb.freeze, await tell(here.path, Verb.prepare))
        assert here.state == PAUSED_STATE
        await tell(here.path, Verb.thaw, note)
        assert here.state == "running"


LONG = b"not\\n\\u001b[31m now" + b"." * 999
WRONG_ANSWERS = [
    (HANG_UP, "it closed the QMP connection"),
    (b'{"return": {}\n', "not QMP"),
    (b"no JSON\n", "not QMP"),
    (b"[]\n", "not QMP"),
    (b"\xff\n", "not QMP"),
    (b"[" * 100_000 + b"\n", "not QMP"),
    (b"x" * (11 << 20), "not QMP"),
    (b'{"id": "NUMBER"}\n', "not QMP"),
    (b'{"id": []}\n', "not QMP"),
    (b'{"error": 1, "id": "NUMBER"}\n', "not QMP"),
    (b'{"error": {"class": "JSONParsing", "desc": "no id"}}\n', "not QMP"),
    (
        b'{"error": {"class": "GenericError", "desc": "not\\n\\u001b[31m now%s"}, "id": "NUMBER"}\n' % (b"." * 999),
        "now",
    ),
]


@pytest.mark.parametrize("command", ["query-status", "stop", "cont"])
@pytest.mark.parametrize(("words", "reason"), WRONG_ANSWERS, ids=lambda words: repr(words[:20]))
async def test_a_wrong_answer_is_a_veto_that_names_the_command(
    tmp_path: Path, command: str, words: bytes, reason: str
) -> None:
    async with vm(tmp_path) as here:
        verb, note = Verb.freeze, await tell(here.path, Verb.prepare)
        if command == "cont":
            verb, note = Verb.thaw, await tell(here.path, Verb.freeze, note)
        here.heard.clear()
        here.instead[command] = words
        said = await veto(here.path, verb, note)
        assert reason in said
        assert f"`{command}`" in said


STATUSES = [b"1", b"null", b"[]", b"{}", b'{"status": 1}', b'{"status": null}']


@pytest.mark.parametrize("status", STATUSES)
async def test_a_status_without_a_state_is_a_veto(tmp_path: Path, status: bytes) -> None:
    async with vm(tmp_path) as here:
        here.instead["query-status"] = b'{"return": %s, "id": "NUMBER"}\n' % status
        assert "names no state" in await veto(here.path, Verb.prepare)


async def test_a_stop_that_does_not_pause_is_a_veto_and_thaw_says_what_it_is_now(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        note = await tell(here.path, Verb.prepare)
        here.pauses_to = "guest-panicked"
        telling, _ = told(Verb.freeze, note)
        with pytest.raises(ParticipantVeto, match="asked to pause, it is `guest-panicked`"):
            await Qemu("vm", socket=str(here.path)).carry_out(telling)
        assert "it does not run again: it is `guest-panicked`" in await veto(here.path, Verb.thaw, telling.note)
        assert "cont" not in here.heard


@pytest.mark.parametrize(
    ("was", "is_now"), [("running", PAUSED_STATE), (PAUSED_STATE, "running"), ("running", "io-error")]
)
async def test_a_vm_that_somebody_changed_since_prepare_is_a_veto_and_is_left_as_it_is(
    tmp_path: Path, was: str, is_now: str
) -> None:
    async with vm(tmp_path) as here:
        here.state = was
        telling, _ = told(Verb.freeze, await tell(here.path, Verb.prepare))
        here.state = is_now
        with pytest.raises(ParticipantVeto, match=f"it was `{was}` when it prepared and is `{is_now}` now"):
            await Qemu("vm", socket=str(here.path)).carry_out(telling)
        await tell(here.path, Verb.thaw, telling.note)
        assert (here.state, here.commands()) == (is_now, [])


@pytest.mark.parametrize(
    "files", [[], ["another"], ["hook"], None], ids=["gone", "another-socket", "a-hook", "unreadable"]
)
async def test_a_vm_is_thawed_at_the_socket_it_was_frozen_at(tmp_path: Path, files: list[str] | None) -> None:
    def read() -> list[Participant]:
        if files is None:
            raise ConfigError("no TOML", where="vm.toml")
        return [Hook("vm") if name == "hook" else Qemu("vm", socket=str(tmp_path / name / "qmp")) for name in files]

    (tmp_path / "another").mkdir()
    (tmp_path / "a vm").mkdir()
    async with vm(tmp_path / "a vm") as here, vm(tmp_path / "another") as other_vm:
        note = await tell(here.path, Verb.prepare)
        frozen = ProducerCall(Verb.freeze, "run-1", note)
        await Qemu("vm", socket=str(other_vm.path)).carry_out(frozen)
        assert (here.state, other_vm.state) == (PAUSED_STATE, "running")
        nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
        holder = ProducerRecord("vm", "qemu", "freeze", frozen.note)
        barrier = ProducerRegistry(read, nobody).resume_barrier("run-1", lambda _member: None, [holder], None)
        assert await barrier.undo_verb(Verb.freeze) == []
        assert here.state == "running"
        assert other_vm.commands() == []


async def test_the_note_of_a_khod_that_wrote_no_socket_is_understood(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.state = PAUSED_STATE
        await tell(here.path, Verb.thaw, prepared(ours()))
        assert here.state == "running"
    nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
    holder = ProducerRecord("vm", "qemu", "freeze", prepared(ours()))
    barrier = ProducerRegistry(list, nobody).resume_barrier("run-1", lambda _member: None, [holder], None)
    ((name, error),) = await barrier.undo_verb(Verb.freeze)
    assert name == "vm"
    assert "is gone" in str(error)


@pytest.mark.parametrize("state", [PAUSED_STATE, "running", "io-error"])
async def test_without_a_record_a_vm_that_is_paused_is_continued(tmp_path: Path, state: str) -> None:
    async with vm(tmp_path) as here:
        here.state = state
        nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
        registry = ProducerRegistry(lambda: [Qemu("vm", socket=str(here.path))], nobody)
        barrier = registry.resume_barrier("", lambda _member: None, (), Verb.freeze)
        assert await barrier.undo_verb(Verb.freeze) == []
        assert here.state == ("running" if state == PAUSED_STATE else state)


async def test_another_process_behind_the_socket_is_not_the_vm_that_prepared(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        here.state = PAUSED_STATE
        with other() as (process, identity):
            note = prepared(identity)
            assert f"process {os.getpid()} has its QMP socket now" in await veto(here.path, Verb.freeze, note)
            assert f"process {process.pid} lives, and may be paused" in await veto(here.path, Verb.thaw, note)
        await tell(here.path, Verb.thaw, note)
        assert (here.state, here.commands()) == (PAUSED_STATE, []), "the VM that was paused is gone, this is another"


async def test_thaw_without_qmp_is_honest_about_what_it_knows(tmp_path: Path) -> None:
    nowhere, lives = tmp_path / "nowhere", f"process {os.getpid()} lives, and may be paused"
    assert lives in await veto(nowhere, Verb.thaw, prepared(ours(), "asked"))
    assert lives in await veto(nowhere, Verb.thaw, prepared(ours(), "prepared")), "a khod before us may have asked"
    await tell(nowhere, Verb.thaw, prepared(ours(), "untouched"))
    await tell(nowhere, Verb.thaw, prepared(ours(), "asked", PAUSED_STATE))
    with other() as (_process, identity):
        pass
    await tell(nowhere, Verb.thaw, prepared(identity, "asked"))
    await tell(nowhere, Verb.thaw, prepared(f"{os.getpid()} 1", "asked"))


async def test_thaw_waits_for_the_end_of_a_process_that_has_closed_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "GRACE_SECONDS", DEADLINE)
    with other() as (process, identity):
        thaw = asyncio.ensure_future(tell(tmp_path / "nowhere", Verb.thaw, prepared(identity)))
        await turns(10)
        assert not thaw.done()
        assert process.stdin is not None
        process.stdin.close()
        await thaw  # and nobody has taken its exit code yet
        assert process.returncode is None


@pytest.mark.parametrize(
    "note", ["", "ready", "prepared running 1", "prepared running 1 x", "soon running 1 2", "a" * 9999]
)
async def test_a_note_that_is_not_ours_is_a_veto(tmp_path: Path, note: str) -> None:
    for verb in (Verb.freeze, Verb.thaw):
        assert "it was not prepared" in await veto(tmp_path / "nowhere", verb, note)


async def test_a_freeze_that_does_not_reach_qemu_needs_no_thaw(tmp_path: Path) -> None:
    telling, _ = told(Verb.freeze, prepared(ours(), "prepared"))
    with pytest.raises(ParticipantVeto, match="cannot be connected to: No such file"):
        await Qemu("vm", socket=str(tmp_path / "nowhere")).carry_out(telling)
    await tell(tmp_path / "nowhere", Verb.thaw, telling.note)


async def test_sockets_nobody_serves_are_a_veto_that_names_the_path(tmp_path: Path) -> None:
    dead, plain, long = tmp_path / "dead", tmp_path / "plain", tmp_path / ("long" * 50)
    plain.touch()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    for path, reason in ((dead, "refused"), (plain, "refused"), (tmp_path, "refused"), (long, "too long")):
        said = await veto(path, Verb.prepare)
        assert str(path) in said
        assert reason in said


async def test_a_missing_library_is_a_veto_that_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    assert "python3-qemu-qmp" in await veto(tmp_path / "nowhere", Verb.prepare)


async def test_the_library_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, khod.producers.qemu; sys.exit('qemu.qmp' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await process.wait() == 0


async def refusal(here: Vm, verb: Verb, note: str = "") -> str:
    """What a barrier says of a VM that misses a deadline of 1 s."""
    barrier = Barrier.from_producers([Qemu("vm", timeout=1.0, socket=str(here.path))], "run-1", lambda _member: None)
    barrier.members[0].telling = ProducerCall(Verb.prepare, "run-1", note)
    with pytest.raises(Refused):
        await barrier.broadcast(verb)
    return barrier.members[0].answer


async def test_the_deadline_says_what_was_waited_for(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        note = await tell(here.path, Verb.prepare)
        here.instead["stop"] = SILENCE
        assert "waiting for its answer to `stop`" in await refusal(here, Verb.freeze, note)
        here.instead["query-status"] = SILENCE
        assert "waiting for its answer to `query-status`" in await refusal(here, Verb.freeze, note)
        here.greeting = SILENCE
        assert "another client may hold it" in await refusal(here, Verb.freeze, note)


async def test_a_socket_that_another_client_holds_is_waited_for(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        reader, writer = await asyncio.open_unix_connection(here.path)
        assert await reader.readline() == GREETING
        assert "another client may hold it" in await refusal(here, Verb.prepare)
        telling, reasons = told(Verb.prepare)
        work = asyncio.ensure_future(Qemu("vm", socket=str(here.path)).carry_out(telling))
        await here.until(lambda: here.accepted == 3)
        await turns(10)  # it is connected, and is not greeted
        assert len(reasons) == 1
        writer.close()
        await work


async def test_a_socket_at_which_too_many_wait_is_waited_for_too(tmp_path: Path) -> None:
    """To asyncio's own connect it would look connected."""
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with socket.socket(socket.AF_UNIX) as second:
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.connect(str(path))
        work = asyncio.ensure_future(tell(path, Verb.prepare))
        await turns(10)
        assert not work.done()
        taken, _ = listener.accept()
        taken.close()
        listener.setblocking(False)
        ours_, _ = await asyncio.get_running_loop().sock_accept(listener)
        ours_.close()
        with pytest.raises(ParticipantVeto, match="it closed the QMP connection"):
            await work


@pytest.mark.parametrize("again", [0, 1, 2, 5])
@pytest.mark.parametrize("verb", [Verb.prepare, Verb.freeze, Verb.thaw])
async def test_wherever_it_is_cancelled_nothing_is_left_and_thaw_puts_it_right(
    tmp_path: Path, verb: Verb, again: int
) -> None:
    """At every turn of the event loop, once, and `again` and again in the turns after."""
    async with vm(tmp_path) as here:
        note = await tell(here.path, Verb.prepare)
        ended, turn = False, 0
        while not ended:
            here.state = PAUSED_STATE if verb is Verb.thaw else "running"
            before = asyncio.all_tasks()
            telling, _ = told(verb, note)
            work = asyncio.ensure_future(Qemu("vm", socket=str(here.path)).carry_out(telling))
            await turns(turn)
            ended = not work.cancel()
            for _more in range(again):
                await turns(1)
                work.cancel()
            await asyncio.wait({work})
            assert ended is not work.cancelled()
            await here.until(lambda: here.clients == 0)
            assert {task for task in asyncio.all_tasks() if "Vm.serve" not in repr(task)} <= before
            await tell(here.path, Verb.thaw, telling.note)
            assert here.state == "running"
            turn += 1
        assert turn > 5


@pytest.mark.parametrize("call", ["connect", "disconnect"])
async def test_a_session_that_does_not_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """QEMU serves nobody else while it lasts: the undo of this very verb would wait for it."""
    monkeypatch.setattr(monitor, "HANG_UP_SECONDS", 0.05)
    call_it = getattr(QMPClient, call)

    async def held_up(client: QMPClient, *arguments: object) -> None:
        try:
            await call_it(client, *arguments)
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()

    async with vm(tmp_path) as here:
        note = await tell(here.path, Verb.freeze, await tell(here.path, Verb.prepare))
        here.gates["query-status"] = here.gates["qmp_capabilities"] = asyncio.Event()
        with monkeypatch.context() as patch:
            patch.setattr(QMPClient, call, held_up)
            thaw = asyncio.ensure_future(tell(here.path, Verb.thaw, note))
            await here.until(lambda: here.clients == 1)
            await turns(20)
            thaw.cancel()
            await asyncio.wait({thaw})
            assert thaw.cancelled()
        for gate in here.gates.values():
            gate.set()
        await tell(here.path, Verb.thaw, note)
        assert here.state == "running"


async def test_a_surprise_in_the_library_is_a_veto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def surprise(_client: QMPClient, _connection: socket.socket) -> None:
        raise AssertionError("what nobody expected")

    monkeypatch.setattr(QMPClient, "connect", surprise)
    async with vm(tmp_path) as here:
        assert "what nobody expected" in await veto(here.path, Verb.prepare)


async def test_what_happens_in_the_vm_meanwhile_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[QMPClient] = []

    class Client(QMPClient):
        def __init__(self) -> None:
            super().__init__()
            clients.append(self)

    monkeypatch.setattr("qemu.qmp.QMPClient", Client)
    async with vm(tmp_path) as here:
        here.once["query-status"] = b'{"event": "NOISE", "data": {}}\n' * 1000 + here.carry_out(
            "query-status", "__qmp#00000"
        )
        await tell(here.path, Verb.prepare)
    assert [client.events.history for client in clients] == [()]


async def test_a_stop_that_takes_effect_after_it_was_cancelled_is_undone(tmp_path: Path) -> None:
    async with vm(tmp_path) as here:
        telling, _ = told(Verb.freeze, await tell(here.path, Verb.prepare))
        gate = here.gates["stop"] = asyncio.Event()
        freeze = asyncio.ensure_future(Qemu("vm", socket=str(here.path)).carry_out(telling))
        await here.until(lambda: "stop" in here.heard)
        freeze.cancel()
        await asyncio.wait({freeze})
        assert freeze.cancelled()
        thaw, reasons = told(Verb.thaw, telling.note)
        thawing = asyncio.ensure_future(Qemu("vm", socket=str(here.path)).carry_out(thaw))
        await here.until(lambda: here.accepted == 3)
        await turns(20)
        assert here.state == "running", "the stop is still under way"
        assert len(reasons) == 1, "and thaw is not told otherwise"
        gate.set()
        await thawing
        assert here.state == "running"
        assert here.commands() == ["stop", "cont"]


async def test_the_library_says_nothing_in_our_journal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
import asyncio
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.qemu import Qemu
try:
    asyncio.run(Qemu("vm", socket={str(tmp_path / "qmp")!r}).carry_out(ProducerCall(Verb.prepare, "run-1")))
except ParticipantVeto as veto:
    print(veto)
"""
    async with vm(tmp_path) as here:
        here.instead["query-status"] = b"no JSON\n"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
        assert await process.wait() == 0
    said = capfd.readouterr()
    assert re.fullmatch(r".*not QMP.*\n", said.out)
    assert said.err == ""


async def test_without_a_record_a_vm_that_is_off_holds_no_abort(tmp_path: Path) -> None:
    """Its file stays when it is switched off; each abort would have failed for it until it was started."""
    nobody = Peers(cast("Sessions", None), lambda _peer: None, lambda _peer: None)
    registry = ProducerRegistry(lambda: [Qemu("vm", socket=str(tmp_path / "absent"))], nobody)
    barrier = registry.resume_barrier("", lambda _member: None, (), Verb.freeze)
    assert await barrier.undo_verb(Verb.freeze) == []
    (member,) = barrier.members
    assert member.gone
