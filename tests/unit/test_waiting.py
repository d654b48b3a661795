# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command of freeze, prepared: it waits in a child here, in a unit of systemd in tests/lab/test_hook_waiting.py."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.producers import waiting
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import Child, Children
from khod.producers.commands import Command
from khod.producers.hooks import Hook
from khod.producers.waiting import Gate, can_wait, waiting_argv

DEADLINE = 20.0


class Prepared:
    """A child that waits at a gate."""

    def __init__(self, command: Command, stdout: int, stderr: int) -> None:
        self.gate = Gate()
        process = subprocess.Popen(
            waiting_argv(command),
            env=command.environment,
            stdin=self.gate.theirs.fileno(),
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self.gate.close_theirs()
        self.child = Child(process, command.environment)
        self.has_ended = False

    def start(self) -> "Prepared | None":
        return None if self.has_ended or not self.gate.open() else self

    async def wait_end(self) -> int | None:
        code = await self.child.wait_end()
        said = waiting._parse_code(self.gate.read_answer() or b"")
        assert code == (-9 if said is None else said if said >= 0 else 128 - said)
        return said

    async def end(self) -> list[str]:
        self.gate.close()
        return await self.child.end()

    async def drop(self) -> None:
        self.gate.close()
        assert await self.child.wait_end() == 0, "it ends by itself"
        await self.child.end()


class Gated(Children):
    """Children that may be prepared; `made` has what was."""

    def __init__(self) -> None:
        self.made: list[Prepared] = []
        self.commands: list[Command] = []

    async def prepare_command(self, command: Command, stdout: int, stderr: int) -> Prepared:  # type: ignore[override]
        self.commands.append(command)
        made = Prepared(command, stdout, stderr)
        self.made.append(made)
        assert await made.gate.wait_ready()
        return made


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Hold after each test that khod has the descriptors that it had before it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


def hook(runner: Gated, *, freeze: list[str], **commands: list[str]) -> Hook:
    return Hook("a", 20.0, commands={"freeze": freeze, **commands}, runner=runner)


async def tell(producer: Hook, *verbs: Verb, run: str = "run-1") -> None:
    for verb in verbs:
        await producer.carry_out(ProducerCall(verb, run))


async def test_freeze_runs_what_prepare_made_and_the_command_sees_nothing_of_it(tmp_path: Path) -> None:
    runner = Gated()
    script = "env; readlink /proc/$$/fd/0; ls /proc/$$/fd"
    producer = hook(runner, freeze=["/bin/sh", "-c", f"({script}) > {tmp_path}/seen"])
    await tell(producer, Verb.prepare)
    assert len(runner.made) == 1
    assert not (tmp_path / "seen").exists()
    await tell(producer, Verb.freeze)
    words = (tmp_path / "seen").read_text().splitlines()
    assert {"KHO_NAME=a", "KHO_VERB=freeze", "KHO_RUN=run-1"} <= set(words)
    assert words[-4:] == ["/dev/null", "0", "1", "2"]


async def test_each_ending_is_that_of_any_command() -> None:
    for script, reason in [
        ("echo not now >&2; exit 3", "not now"),
        ("exit 4", "exit code 4"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("kill -40 $$", "killed by "),
        ("kill -KILL $PPID; exit 3", "not known"),
    ]:
        producer = hook(Gated(), freeze=["/bin/sh", "-c", script])
        await tell(producer, Verb.prepare)
        with pytest.raises(ParticipantVeto, match=reason):
            await tell(producer, Verb.freeze)


@pytest.mark.parametrize("command", ["/no/such/command", "no-such-command", "/etc"])
async def test_a_command_that_cannot_be_started_says_so(command: str) -> None:
    producer = hook(Gated(), freeze=[command])
    await tell(producer, Verb.prepare)
    with pytest.raises(ParticipantVeto, match=f"^{command} cannot be started: [^:]+$"):
        await tell(producer, Verb.freeze)


@pytest.mark.parametrize("cancel", [[], ["cancel"]])
async def test_cancel_drops_it_unrun(tmp_path: Path, cancel: list[str]) -> None:
    runner = Gated()
    commands = {verb: ["touch", f"{tmp_path}/cancelled"] for verb in cancel}
    producer = hook(runner, freeze=["touch", f"{tmp_path}/frozen"], **commands)
    await tell(producer, Verb.prepare, Verb.cancel)
    assert not runner.made[0].child.is_running
    assert os.listdir(tmp_path) == (["cancelled"] if cancel else [])


async def test_what_another_run_prepared_is_not_run(tmp_path: Path) -> None:
    runner = Gated()
    producer = hook(runner, freeze=["/bin/sh", "-c", f"echo $KHO_RUN >> {tmp_path}/frozen"])
    await tell(producer, Verb.prepare, run="run-1")
    await tell(producer, Verb.prepare, Verb.freeze, run="run-2")
    assert [made.child.is_running for made in runner.made] == [False, False]
    assert (tmp_path / "frozen").read_text() == "run-2\n"


async def test_what_has_ended_meanwhile_is_started_as_any_other(tmp_path: Path) -> None:
    runner = Gated()
    producer = hook(runner, freeze=["/bin/sh", "-c", f"echo once >> {tmp_path}/frozen"])
    await tell(producer, Verb.prepare)
    runner.made[0].has_ended = True
    await tell(producer, Verb.freeze)
    await tell(producer, Verb.thaw, Verb.freeze)
    assert (tmp_path / "frozen").read_text() == "once\nonce\n", "the second one was never prepared: its freeze is held"


async def test_a_prepare_that_fails_prepares_nothing() -> None:
    runner = Gated()
    with pytest.raises(ParticipantVeto):
        await tell(hook(runner, freeze=["/bin/true"], prepare=["/bin/false"]), Verb.prepare)
    await tell(Hook("a", commands={"prepare": ["/bin/true"]}, runner=runner), Verb.prepare)
    assert runner.made == []


async def test_a_khod_that_dies_runs_nothing(tmp_path: Path) -> None:
    """The end of the file, without `drop`: the gate is closed by the kernel, or where nobody has it any more."""
    runner = Gated()
    producer = hook(runner, freeze=["touch", f"{tmp_path}/frozen"])
    await tell(producer, Verb.prepare)
    child = runner.made[0].child
    runner.made[0].gate.close()
    assert await child.wait_end() == 0
    await tell(producer, Verb.cancel)
    assert os.listdir(tmp_path) == []


async def test_a_shell_that_cannot_do_its_part_does_not_wait() -> None:
    """It may start no process, or has no descriptors left: the command alone could still run."""
    for limit in ("--nproc=1", "--nofile=4"):
        gate = Gate()
        command = Command("a", ["/bin/true"], {})
        words = ["prlimit", limit, *waiting_argv(command)]
        user = 65534 if os.getuid() == 0 else os.getuid()
        null = subprocess.DEVNULL
        process = subprocess.Popen(words, stdin=gate.theirs.fileno(), stderr=null, user=user)  # noqa: ASYNC220
        gate.close_theirs()
        assert not await asyncio.wait_for(gate.wait_ready(), DEADLINE)
        gate.close()
        process.wait()


def test_what_does_not_wait() -> None:
    assert can_wait(Command("a", ["true"], {}, {"Nice": ("i", 5)}))
    assert not can_wait(Command("a", ["true"], {}, {"RuntimeMaxUSec": ("t", 1)}))
    assert not can_wait(Command("a", ["-x"], {}))
    assert not can_wait(Command("a", ["a=b"], {}))
