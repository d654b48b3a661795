# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs by QMP, against a real QEMU whose state is seen through a second monitor. No kernel is booted in it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.qemu import Qemu
from tests.lab.errors import LabError

PROGRAM = "qemu-system-x86_64"
SMALLEST = ["-M", "none", "-accel", "tcg", "-display", "none", "-nodefaults"]
PC = ["-M", "q35", "-m", "16M", "-accel", "tcg", "-display", "none", "-nodefaults"]
SLOW_DISK = "null-co,node-name=slow,latency-ns=5000000000,size=1048576"
DEADLINE = 60.0  # seconds; a test that needs it has hung


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test

    asyncio.run(bounded())


@contextmanager
def started(*options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU; it ends with the block, its exit code is taken then and not before."""
    try:
        process = subprocess.Popen([PROGRAM, *options], pass_fds=pass_fds)
    except FileNotFoundError as error:
        raise LabError(f"{PROGRAM} is not installed: see tests/lab/packages.txt") from error
    with process:
        try:
            yield process
        finally:
            process.kill()


class Machine:
    """A QEMU with its QMP at `path`, and `monitor`, another QMP of it that it connected to us."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes], monitor: QMPClient) -> None:
        self.path = path
        self.process = process
        self.monitor = monitor

    async def state(self) -> str:
        answer = await self.monitor.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    async def tell(self, verb: Verb, note: str = "") -> str:
        telling = ProducerCall(verb, "run-1", note)
        await Qemu("vm", socket=str(self.path)).carry_out(telling)
        return telling.note

    async def veto(self, verb: Verb, note: str = "") -> str:
        with pytest.raises(ParticipantVeto) as raised:
            await self.tell(verb, note)
        return str(raised.value)


@asynccontextmanager
async def machine(directory: Path, *options: str, listener: socket.socket | None = None) -> AsyncIterator[Machine]:
    """Start a QEMU and wait until it speaks to us; with a `listener` that is where it serves QMP."""
    path, ours = directory / "qmp", str(directory / "monitor")
    fds: tuple[int, ...] = ()
    where = f"path={path}"
    if listener is not None:
        where, fds = f"fd={listener.fileno()}", (listener.fileno(),)
    qmp = ["-chardev", f"socket,id=qmp,{where},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    monitor = QMPClient()
    await monitor.start_server(ours)
    with started(*(options or SMALLEST), *qmp, "-qmp", f"unix:{ours}", pass_fds=fds) as process:
        await monitor.accept()
        try:
            yield Machine(path, process, monitor)
        finally:
            with suppress(EOFError, ConnectionError):  # the test may have killed it
                await monitor.disconnect()


def test_it_is_paused_from_freeze_to_thaw(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path, *PC) as vm:
            note = await vm.tell(Verb.prepare)
            assert f" {vm.process.pid} " in note
            assert await vm.state() == "running"
            note = await vm.tell(Verb.freeze, note)
            assert await vm.state() == "paused"
            note = await vm.tell(Verb.thaw, note)
            assert await vm.state() == "running"
            await vm.tell(Verb.cancel, note)
            assert await vm.state() == "running"

    run(test())


def test_one_that_its_operator_paused_stays_paused(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            await vm.monitor.execute("stop")
            note = await vm.tell(Verb.freeze, await vm.tell(Verb.prepare))
            await vm.tell(Verb.thaw, note)
            assert await vm.state() == "paused"

    run(test())


@pytest.mark.parametrize(("option", "state"), [(["-S"], "prelaunch"), (["-incoming", "defer"], "inmigrate")])
def test_one_that_does_not_run_yet_is_a_veto(tmp_path: Path, option: list[str], state: str) -> None:
    async def test() -> None:
        async with machine(tmp_path, *SMALLEST, *option) as vm:
            assert f"it is `{state}`" in await vm.veto(Verb.prepare)
            assert await vm.state() == state

    run(test())


def test_one_that_was_migrated_away_is_a_veto(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path, *PC) as vm:
            with vm.monitor.listener("STOP") as stops:
                await vm.monitor.execute("migrate", {"uri": f"exec:cat > {tmp_path / 'stream'}"})
                await stops.get()
            while await vm.state() != "postmigrate":
                assert await vm.state() in ("finish-migrate", "postmigrate")
            assert "it is `postmigrate`" in await vm.veto(Verb.prepare)

    run(test())


def test_one_that_is_killed_before_freeze_is_a_veto_and_needs_no_thaw(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            note = await vm.tell(Verb.prepare)
            vm.process.kill()
            assert "QMP" in await vm.veto(Verb.freeze, note)
            await vm.tell(Verb.thaw, note)
            await vm.tell(Verb.cancel, note)
            vm.process.wait()
            await vm.tell(Verb.thaw, note)

    run(test())


def test_one_that_is_killed_while_it_is_frozen_needs_no_thaw(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            note = await vm.tell(Verb.freeze, await vm.tell(Verb.prepare))
            vm.process.kill()
            await vm.tell(Verb.thaw, note)

    run(test())


def test_one_in_its_place_is_not_thawed_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            note = await vm.tell(Verb.freeze, await vm.tell(Verb.prepare))
            vm.process.kill()
            vm.process.wait()
        async with machine(tmp_path, *SMALLEST, "-S") as vm:
            await vm.monitor.execute("cont")
            await vm.monitor.execute("stop")
            assert f"process {vm.process.pid} has its QMP socket now" in await vm.veto(Verb.freeze, note)
            await vm.tell(Verb.thaw, note)
            assert await vm.state() == "paused"

    run(test())


def test_a_socket_that_somebody_removed(tmp_path: Path) -> None:
    """What was paused stays paused, and khod says so; what was not asked to pause needs nothing."""

    async def test() -> None:
        async with machine(tmp_path) as vm:
            prepared = await vm.tell(Verb.prepare)
            frozen = await vm.tell(Verb.freeze, prepared)
            vm.path.rename(tmp_path / "elsewhere")
            assert f"process {vm.process.pid} lives, and may be paused" in await vm.veto(Verb.thaw, frozen)
            assert await vm.state() == "paused"
            (tmp_path / "elsewhere").rename(vm.path)
            await vm.tell(Verb.thaw, frozen)
            assert await vm.state() == "running"
            vm.path.unlink()
            telling = ProducerCall(Verb.freeze, "run-1", prepared)
            with pytest.raises(ParticipantVeto, match="No such file"):
                await Qemu("vm", socket=str(vm.path)).carry_out(telling)
            await vm.tell(Verb.thaw, telling.note)
            # A khod that was started since has nothing but the note of prepare, and cannot know.
            assert "may be paused" in await vm.veto(Verb.thaw, prepared)

    run(test())


def test_a_stop_under_way_when_it_is_cancelled_is_undone(tmp_path: Path) -> None:
    """`stop` waits for the disk. QEMU finishes it, gives its answer to our next connection, and then obeys that."""

    async def test() -> None:
        async with machine(tmp_path, *SMALLEST, "-blockdev", SLOW_DISK) as vm:
            telling = ProducerCall(Verb.freeze, "run-1", await vm.tell(Verb.prepare))
            await vm.monitor.execute("human-monitor-command", {"command-line": 'qemu-io slow "aio_write 0 4k"'})
            with vm.monitor.listener(("STOP", "RESUME")) as events:
                freeze = asyncio.ensure_future(Qemu("vm", socket=str(vm.path)).carry_out(telling))
                assert (await events.get())["event"] == "STOP"
                assert not freeze.done(), "the write takes five seconds"
                freeze.cancel()
                await asyncio.wait({freeze})
                assert freeze.cancelled()
                await vm.tell(Verb.thaw, telling.note)
                assert (await events.get())["event"] == "RESUME"
                assert events.empty()
            assert await vm.state() == "running"

    run(test())


def test_wherever_freeze_is_cancelled_thaw_puts_it_right(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            note = await vm.tell(Verb.prepare)
            ended, turn, reached = False, 0, set()
            while not ended:
                telling = ProducerCall(Verb.freeze, "run-1", note)
                freeze = asyncio.ensure_future(Qemu("vm", socket=str(vm.path)).carry_out(telling))
                for _turn in range(turn):
                    await asyncio.sleep(0)
                ended = not freeze.cancel()
                await asyncio.wait({freeze})
                reached.add(telling.note.split()[0])
                await vm.tell(Verb.thaw, telling.note)
                assert await vm.state() == "running"
                turn = turn + 1 + turn // 8
            assert reached == {"prepared", "untouched", "asked"}

    run(test())


def waiters(path: Path) -> list[socket.socket]:
    """Connect until there is no room for another that waits."""
    waiting: list[socket.socket] = []
    for _room in range(100):
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].setblocking(False)
        try:
            waiting[-1].connect(str(path))
        except BlockingIOError:
            return waiting
    raise AssertionError(f"{len(waiting)} clients wait at {path} and there is still room")


def test_a_client_that_holds_the_socket_is_waited_for(tmp_path: Path) -> None:
    """The queue of QEMU's listener is short; even with a full one it is a wait, and ends when the client leaves."""

    async def test() -> None:
        async with machine(tmp_path) as vm:
            holder = QMPClient()
            await holder.connect(str(vm.path))
            waiting = waiters(vm.path)
            reasons: list[str] = []
            telling = ProducerCall(Verb.prepare, "run-1", "", lambda reason, _progress: reasons.append(reason))
            prepare = asyncio.ensure_future(Qemu("vm", socket=str(vm.path)).carry_out(telling))
            assert await vm.state() == "running"  # a round trip
            assert not prepare.done()
            assert ["another client may hold it" in reason for reason in reasons] == [True]
            for client in waiting:
                client.close()
            await holder.disconnect()
            await prepare

    run(test())


def test_the_process_is_found_behind_a_socket_that_somebody_else_bound(tmp_path: Path) -> None:
    """As libvirt does it: SO_PEERCRED names the last to call listen(2), and QEMU does."""

    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "qmp"))
            listener.listen(1)
            async with machine(tmp_path, listener=listener) as vm:
                assert f" {vm.process.pid} " in await vm.tell(Verb.prepare)

    run(test())


def test_one_that_does_not_answer_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with machine(tmp_path) as vm:
            note = await vm.tell(Verb.prepare)
            os.kill(vm.process.pid, signal.SIGSTOP)
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await vm.tell(Verb.freeze, note)
            finally:
                os.kill(vm.process.pid, signal.SIGCONT)
            await vm.tell(Verb.thaw, note)
            assert await vm.state() == "running"

    run(test())
