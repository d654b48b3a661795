# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a guest of khod-vm stands still beside what QEMU needs for it, with real QEMUs and no kexec.

By hand means: the same work with as little code as possible, as an operator would write it for this one machine.
"""

import asyncio
import fcntl
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khod.vm.arguments import MEMORY_NAME
from khod.vm.migration import continue_guest, load_state, save_state
from khod.vm.process import VmProcess, create_memory
from khod.vm.settings import VmSettings
from tests.bench.figure import Figure
from tests.lab.counter import write_image

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

ROUNDS = 21
SIZES = {"64 MiB": 64 << 20, "1 GiB": 1 << 30, "8 GiB": 8 << 30}
MOST_SAVE = 1.5
MOST_GROWTH = 1.5
MOST_RESTORE = 1.2
BLOCK = 1 << 20
POLL_SECONDS = 0.001
COMMAND = ("qemu-system-x86_64", "-machine", "pc-q35-7.2", "-accel", "tcg", "-display", "none", "-nodefaults")
CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


def run() -> Iterator[Figure]:
    """Measure a guest of each size, all of whose memory is allocated."""
    saves = {}
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as directory:
            (machine := Path(directory) / "vm").mkdir()  # its slots are beside it
            save, by_hand, restore, bare = asyncio.run(_measure(machine, size))
        saves[name] = save
        yield _compare(f"stop and device state of a VM of {name} / migrate by hand", save, by_hand, MOST_SAVE)
        yield _compare(f"restore of a VM of {name} / QEMU's own start with -incoming", restore, bare, MOST_RESTORE)
    small, *_, large = saves
    yield _compare(f"stop and device state of a VM of {large} / of {small}", saves[large], saves[small], MOST_GROWTH)


def _compare(name: str, ours: Sequence[float], theirs: Sequence[float], most: float) -> Figure:
    mine, other = statistics.median(ours), statistics.median(theirs)
    return Figure(name, mine / other, most, "", f"{mine * 1e3:.1f} ms and {other * 1e3:.1f} ms, medians of {ROUNDS}")


async def _measure(directory: Path, size: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return seconds of one VM: saved by khod and by hand, restored by khod and by hand; in turn."""
    image = write_image(directory / "guest")
    command = (*COMMAND, "-m", f"{size >> 20}M", "-bios", str(image))
    memory = create_memory(size)
    for at in range(0, size, BLOCK):
        os.pwrite(memory, b"\xa5" * BLOCK, at)
    process = VmProcess(VmSettings("bench", command, size), directory)
    saves, by_hand, restores, bare = [], [], [], []
    try:
        async with process.start_session(command, {MEMORY_NAME: memory}):
            pass
        for _ in range(ROUNDS):
            by_hand.append(await _save_by_hand(str(directory / "qmp")))
            took, state = await _save(process)
            saves.append(took)
            await process.kill()
            try:
                bare.append(_start_bare(command, memory, state, directory / "bare"))
                restores.append(await _restore(process, command, memory, state))
            finally:
                os.close(state)
    finally:
        await process.kill()
        os.close(memory)
    return saves, by_hand, restores, bare


async def _save(process: VmProcess) -> tuple[float, int]:
    """Return the seconds from khod's connection to QEMU to the complete state, and the state."""
    state = os.memfd_create("state", os.MFD_CLOEXEC)
    began = time.perf_counter()
    async with process.open_monitor() as vm:
        await save_state(vm, state)
        took = time.perf_counter() - began
    return took, state


async def _save_by_hand(path: str) -> float:
    from qemu.qmp import QMPClient  # noqa: PLC0415 - it takes 70 ms

    state = os.memfd_create("by-hand", os.MFD_CLOEXEC)
    client = QMPClient()
    began = time.perf_counter()
    await client.connect(path)
    await client.execute("stop")
    await client.execute("migrate-set-capabilities", CAPABILITIES)
    reader, writer = os.pipe()
    client.send_fd_scm(writer)
    await client.execute("getfd", {"fdname": "by-hand"})
    os.close(writer)
    copying = asyncio.ensure_future(asyncio.to_thread(_copy, reader, state))
    await client.execute("migrate", {"uri": "fd:by-hand"})
    await copying
    await _wait_completed(client)
    took = time.perf_counter() - began
    assert os.fstat(state).st_size
    await client.execute("cont")
    await client.disconnect()
    os.close(state)
    return took


async def _wait_completed(client: "QMPClient") -> None:
    while True:
        answer = await client.execute("query-migrate")
        assert isinstance(answer, dict)
        if answer["status"] == "completed":
            return


def _copy(reader: int, file: int) -> None:
    with open(reader, "rb") as stream:
        os.write(file, stream.read())


async def _restore(process: VmProcess, command: Sequence[str], memory: int, state: int) -> float:
    began = time.perf_counter()
    async with process.start_session(command, {MEMORY_NAME: memory}, incoming=True) as vm:
        await load_state(vm, state)
        await continue_guest(vm)
        return time.perf_counter() - began


def _start_bare(command: Sequence[str], memory: int, state: int, path: Path) -> float:
    """Start QEMU with a state, and return the seconds until it answers that the guest runs; end it.

    The state is in the pipe before QEMU asks for it. `-incoming` cannot name the pipe itself: the capability that the
    state was written with can only be set over QMP.
    """
    backend = (
        f"memory-backend-file,id={MEMORY_NAME},size={os.fstat(memory).st_size},mem-path=/proc/self/fd/{memory},share=on"
    )
    ours = ("-object", backend, "-machine", f"memory-backend={MEMORY_NAME}", "-qmp", f"unix:{path},server=on,wait=off")
    argv = [*command, *ours, "-incoming", "defer"]
    began = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[memory], process_group=0) as process:
        try:
            with _connect(path) as connection, connection.makefile("rb") as answers:
                answers.readline()
                _ask(connection, answers, "qmp_capabilities")
                _ask(connection, answers, "migrate-set-capabilities", CAPABILITIES)
                reader = _fill_pipe(state)
                _ask(connection, answers, "getfd", {"fdname": "bare"}, [reader])
                os.close(reader)
                _ask(connection, answers, "migrate-incoming", {"uri": "fd:bare"})
                while _ask(connection, answers, "query-status")["status"] == "inmigrate":
                    time.sleep(POLL_SECONDS)
                _ask(connection, answers, "cont")
                assert _ask(connection, answers, "query-status")["status"] == "running"
                return time.perf_counter() - began
        finally:
            process.kill()
            path.unlink(missing_ok=True)


def _connect(path: Path) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(POLL_SECONDS)


def _fill_pipe(state: int) -> int:
    content = os.pread(state, os.fstat(state).st_size, 0)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, max(len(content), BLOCK))
    os.write(writer, content)
    os.close(writer)
    return reader


def _ask(
    connection: socket.socket, answers: Any, command: str, arguments: object = None, fds: Sequence[int] = ()
) -> Any:
    call = {"execute": command, **({"arguments": arguments} if arguments else {})}
    socket.send_fds(connection, [json.dumps(call).encode()], fds)
    while True:
        answer = json.loads(answers.readline())
        assert "error" not in answer, answer
        if "return" in answer:
            return answer["return"]
