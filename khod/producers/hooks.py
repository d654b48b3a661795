"""Producers that are commands: /etc/kho/producers.d/NAME.toml names one for each verb.

A hook runs with a clean environment (PATH, KHO_VERB, KHO_RUN), in a session of its own, its output in
khod's journal. Exit code 0 is a yes; any other is a veto, the last line on standard error the reason.
At its deadline the whole session's process group is killed: a child left behind must not thaw later.
"""

import asyncio
import os
import re
import signal
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from khod.errors import ConfigError
from khod.producers.barrier import Verb, Veto

DIRECTORY = "etc/kho/producers.d"
VERBS = ("prepare", "freeze", "thaw", "cancel", "restore", "finish")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL = 4096
LEFT = 4 << 16
"""Bytes a command may have said and not been heard at its end: a full pipe, and what asyncio reads ahead."""


@dataclass(frozen=True)
class Hook:
    """One hook file. `timeout` in seconds, for each verb; a verb without a command is a yes."""

    name: str
    commands: dict[str, list[str]] = field(default_factory=dict)
    timeout: float = 30.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    kind: str = "hook"

    async def tell(self, verb: Verb, run: str) -> None:
        """Run the verb's command; Veto where it does not start or does not exit with 0."""
        argv = self.commands.get(verb.value)
        if argv is None:
            return
        environment = {"PATH": PATH, "KHO_VERB": verb.value, "KHO_RUN": run}
        # A pipe of our own: asyncio's would hold process.wait() back for as long as a child of the hook has it open.
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb", buffering=0) as errors:
            try:
                process = await _spawn(argv, environment, writer)
            except OSError as error:
                raise Veto(f"{argv[0]} cannot be started: {error.strerror}") from None
            finally:
                os.close(writer)
            try:
                reason = await _last_line(errors, process)
                code = await process.wait()
            finally:
                await _end(process)
        if code != 0:
            raise Veto(reason or (f"exit code {code}" if code > 0 else f"killed by {_signal(-code)}"))


async def _spawn(argv: list[str], environment: dict[str, str], stderr: int) -> asyncio.subprocess.Process:
    """Start the command in a session of its own; a deadline in the middle of it leaves nothing running."""
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv, env=environment, stdin=asyncio.subprocess.DEVNULL, stderr=stderr, start_new_session=True
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


def _signal(number: int) -> str:
    """Name a signal; real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def _last_line(errors: BinaryIO, process: asyncio.subprocess.Process) -> str:
    """Pass standard error on, keep its last line; ends with the command, whoever still holds the pipe."""
    stream = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(stream)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, errors)
    ended = asyncio.ensure_future(process.wait())
    tail, left = b"", LEFT
    try:
        while left > 0:
            read = asyncio.ensure_future(stream.read(TAIL))
            await asyncio.wait({read, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                read.cancel()  # the command is gone and has said all it will
                break
            if not (chunk := read.result()):
                break
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
            tail = (tail + chunk)[-TAIL:]
            left -= len(chunk) if ended.done() else 0  # what a child still says is not waited for
    finally:
        transport.close()
        ended.cancel()
    lines = tail.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def load(root: Path = Path("/")) -> list[Hook]:
    """Read every hook file, by name; ConfigError that names the file."""
    return [_read(path) for path in sorted((root / DIRECTORY).glob("*.toml"))]


def _read(path: Path) -> Hook:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The producer cannot be read: {error}", where=str(path)) from None
    if not NAME.fullmatch(path.stem):
        raise ConfigError(
            f"{path.stem!r} is no name for a producer",
            where=str(path),
            remedy="Letters, digits, `.`, `_` and `-`, at most 64.",
        )
    commands = {verb: _strings(values.pop(verb), path, verb) for verb in VERBS if verb in values}
    timeout = values.pop("timeout", 30.0)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigError(f"`timeout` is {timeout!r}", where=str(path), remedy="It takes a positive number of seconds.")
    after, before = (tuple(_strings(values.pop(key, []), path, key)) for key in ("after", "before"))
    if values:
        raise ConfigError(
            f"`{min(values)}` is no key of a producer's",
            where=str(path),
            remedy=f"Known here: {', '.join((*VERBS, 'timeout', 'after', 'before'))}.",
        )
    return Hook(path.stem, commands, float(timeout), after, before)


def _strings(value: Any, path: Path, key: str) -> list[str]:
    if (
        not isinstance(value, list)
        or not all(isinstance(word, str) and word for word in value)
        or (key in VERBS and not value)
    ):
        raise ConfigError(
            f"`{key}` is {value!r}", where=str(path), remedy='It takes a list of strings, ["/path", "arg"].'
        )
    return value
