"""io.kho.Producer over one engine."""

import asyncio

from asyncvarlink import (
    FileDescriptor,
    varlinkmethod,
)

from khod import model, wire
from khod.engine import Engine
from khod.errors import Refused, UsageError
from khod.producers.configured import one_line
from khod.producers.identity import process_of, unit_of
from khod.producers.peers import Answer, Terms
from khod.protocol import Command, Producer, Registered, Word
from khod.record import Owner
from khod.server.connection import CONNECTION, privileged, wired

MAX_FILE_NAME = 255
"""Characters of the name a producer gives a file: it stands in the record."""


class Producers(Producer):
    """The producers' interface over one engine."""

    render_interface_description = Producer.render_interface_description

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @varlinkmethod
    async def Register(
        self,
        *,
        name: str,
        version: int,
        timeout: float | None = None,
        after: list[str] | None = None,
        before: list[str] | None = None,
        devices: list[str] | None = None,
    ) -> Registered:
        with wired():
            connection, access = CONNECTION.get(), self._engine.config.access
            peer = privileged("be a producer", access.group, access.producers)
            if version < 1:
                raise UsageError(f"There is no version {version} of {wire.PRODUCER}", where="version", remedy="Give 1.")
            if connection.producer is not None:
                raise Refused(f"This connection is producer {connection.producer.name}", remedy="Open another one.")
            owner, process = Owner(peer.uid, unit_of(peer.pid)), process_of(peer.pid)
            if process is None:
                raise Refused("The process that connected has ended", where=f"process {peer.pid}")
            terms = Terms(
                30.0 if timeout is None else timeout, tuple(after or ()), tuple(before or ()), tuple(devices or ())
            )
            try:
                made = await self._engine.register(name, owner, process, terms)
            except Refused:
                # A connection is one producer; kept open, thousands of them would leave no room for anyone else.
                asyncio.get_running_loop().call_soon(connection.hang_up)
                raise
            connection.enlist(made)
            connection.on_end.append(lambda: self._engine.muster.peers.leave(made))
            if connection.peer is None:  # it went while khod looked
                self._engine.muster.peers.leave(made)
            return {"version": wire.PRODUCER_VERSION, "run": made.run, "told": made.told}

    @varlinkmethod
    async def Next(
        self,
        *,
        serial: int | None = None,
        answer: Word | None = None,
        reason: str | None = None,
        progress: float | None = None,
        names: list[str] | None = None,
        tokens: list[int] | None = None,
        fds: list[FileDescriptor] | None = None,
    ) -> Command:
        with wired():
            connection = CONNECTION.get()
            if (peer := connection.producer) is None:
                raise Refused("This connection is no producer", remedy=f"Call {wire.PRODUCER}.Register first.")
            try:
                said = None if answer is None else _answer(serial, answer, reason, progress, names, tokens, fds)
                command = await peer.next(said)
            except UsageError:
                asyncio.get_running_loop().call_soon(connection.hang_up)
                raise
            return {
                "serial": command.serial,
                "verb": command.verb.value,
                "run": command.run,
                "timeout": command.timeout,
                "names": [kept.name for kept in command.kept],
                "tokens": [kept.token for kept in command.kept],
                "fds": [FileDescriptor(fd, should_close=True) for fd in command.fds],
            }


def _answer(
    serial: int | None,
    word: Word,
    reason: str | None,
    progress: float | None,
    names: list[str] | None,
    tokens: list[int] | None,
    fds: list[FileDescriptor] | None,
) -> Answer:
    """Check what a producer said; UsageError where it makes no sense."""
    if serial is None:
        raise UsageError("An answer to no command", where="serial", remedy="Give the command's serial.")
    names, tokens, fds = names or [], tokens or [], fds or []
    if not len(names) == len(tokens) == len(fds):
        raise UsageError(
            f"{len(names)} names, {len(tokens)} tokens and {len(fds)} descriptors",
            where="names/tokens/fds",
            remedy="Give as many of each.",
        )
    for name, token in zip(names, tokens, strict=True):
        if not 0 <= token < 1 << 64:
            raise UsageError(f"The token {token} is no u64", where=name[:MAX_FILE_NAME])
        if not name or len(name) > MAX_FILE_NAME or not name.isprintable():
            raise UsageError(f"{name[:MAX_FILE_NAME]!r} is no name for a file", where="names")
    if progress is not None and not 0 <= progress <= 1:
        raise UsageError(f"The progress is {progress}", where="progress", remedy="It goes from 0 to 1.")
    files = [(model.Kept(name, token), fd.fileno()) for name, token, fd in zip(names, tokens, fds, strict=True)]
    return Answer(serial, word.value, one_line(reason or ""), progress, files)
