"""Producers that are commands: /etc/kho/producers.d/NAME.toml names one for each verb.

A hook runs with a clean environment (PATH, KHO_NAME, KHO_VERB, KHO_RUN), in a session of its own, its
output in khod's journal. Exit code 0 is a yes; any other is a veto, the last line on standard error the
reason. At its deadline it is killed with everything it started: a child left behind must not thaw later.
One that left the session for its own is found as an orphan: khod is the one orphans below it go to.
"""

import asyncio
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from khod.producers.barrier import Telling, Veto
from khod.producers.configured import Configured, one_line
from khod.producers.identity import ended, process_of

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CHUNK = 1 << 18
"""Bytes a pipe holds and a read takes: what says much is heard quickly."""
TAIL = 4096
LEFT = 4 * CHUNK
"""Bytes a command may have said and not been heard at its end: a full pipe, and what asyncio reads ahead."""
PASSED_ON = 1 << 20
"""Bytes of each output of a command that reach the journal; one that never ends must not fill it."""

DYING = 1.0
"""Seconds a killed child has to be gone."""

PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.restype = ctypes.c_int
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


@dataclass(frozen=True)
class Hook(Configured):
    """One hook file; a verb without a command is a yes."""

    commands: dict[str, list[str]] = field(default_factory=dict)
    kind: str = "hook"

    @property
    def restores(self) -> bool:
        return "restore" in self.commands or "finish" in self.commands

    async def tell(self, telling: Telling) -> None:
        """Run the verb's command; Veto where it does not start or does not exit with 0."""
        argv = self.commands.get(telling.verb.value)
        if argv is None:
            return
        environment = {
            "PATH": PATH,
            "KHO_NAME": self.name,
            "KHO_VERB": telling.verb.value,
            "KHO_RUN": telling.run,
        }
        # Pipes of our own: asyncio's would hold process.wait() back for as long as a child of the hook has them open.
        ends = [os.pipe(), os.pipe()]
        for reader, _writer in ends:
            with suppress(PermissionError):  # without CAP_SYS_RESOURCE there is a bound on all of them together
                fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, CHUNK)
        output, errors = (os.fdopen(reader, "rb", buffering=0) for reader, _ in ends)
        with output, errors:
            try:
                process = await _spawn(argv, environment, *(writer for _, writer in ends))
            except OSError as error:
                raise Veto(f"{argv[0]} cannot be started: {error.strerror}") from None
            finally:
                for _, writer in ends:
                    os.close(writer)
            try:
                _said, reason = await asyncio.gather(
                    _last_line(output, process, sys.stdout.buffer), _last_line(errors, process, sys.stderr.buffer)
                )
                code = await process.wait()
            finally:
                await _end(process)
                await _end_orphans(environment)
        if code != 0:
            raise Veto(reason or (f"exit code {code}" if code > 0 else f"killed by {_signal(-code)}"))


async def _spawn(argv: list[str], environment: dict[str, str], stdout: int, stderr: int) -> asyncio.subprocess.Process:
    """Start the command in a session of its own; a deadline in the middle of it leaves nothing running."""
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        # asyncio itself would kill the command and leave its children.
        await _end(await spawning)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of the command's session, and take its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def adopt_orphans() -> None:
    """Have the kernel give this process the orphans below it: PR_SET_CHILD_SUBREAPER of prctl(2)."""
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "prctl(PR_SET_CHILD_SUBREAPER)")


async def _end_orphans(environment: Mapping[str, str]) -> None:
    """Kill the command's children that left its session, and theirs, which come to us in turn.

    They are known by the environment they were started with. One that does not die is left to itself: it
    sleeps in the kernel, and nothing of it runs any more.
    """
    mine = {f"{name}={value}".encode() for name, value in environment.items()}
    killed: set[int] = set()
    while orphans := [pid for pid in _children() if pid not in killed and mine <= _environment(pid)]:
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)  # our own child: its number is not used again before it is waited for
            with suppress(TimeoutError):
                async with asyncio.timeout(DYING):
                    await ended(process_of(pid))
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
        killed.update(orphans)


def _children() -> list[int]:
    """This process's children; none where the kernel does not list them (CONFIG_PROC_CHILDREN)."""
    lists = Path("/proc/self/task").glob("*/children")
    with suppress(FileNotFoundError):
        return [int(pid) for file in lists for pid in file.read_text().split()]
    return []


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _signal(number: int) -> str:
    """Name a signal; real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def _last_line(said: BinaryIO, process: asyncio.subprocess.Process, to: BinaryIO) -> str:
    """Pass an output on, keep its last line; ends with the command, whoever still holds the pipe."""
    stream = asyncio.StreamReader(limit=CHUNK)
    protocol = asyncio.StreamReaderProtocol(stream)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, said)
    over = asyncio.ensure_future(process.wait())
    tail, left, passed = b"", LEFT, 0
    try:
        while left > 0:
            read = asyncio.ensure_future(stream.read(CHUNK))
            await asyncio.wait({read, over}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                read.cancel()  # the command is gone and has said all it will
                break
            if not (chunk := read.result()):
                break
            to.write(chunk[: max(0, PASSED_ON - passed)])
            to.flush()
            passed += len(chunk)
            tail = (tail + chunk[-TAIL:])[-TAIL:]
            left -= len(chunk) if over.done() else 0  # what a child still says is not waited for
    finally:
        transport.close()
        over.cancel()
    if passed > PASSED_ON:
        to.write(f"\n({passed - PASSED_ON} bytes more were left out here)\n".encode())
        to.flush()
    lines = tail.decode(errors="replace").split("\n")
    return next((one_line(line) for line in reversed(lines) if line.strip()), "")
