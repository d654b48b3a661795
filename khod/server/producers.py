# SPDX-License-Identifier: LGPL-2.1-or-later
"""io.kho.Producer over one engine."""

from dataclasses import replace
from functools import partial

from asyncvarlink import FileDescriptor, varlinkmethod

from khod import model, wire
from khod.engine import Engine
from khod.errors import Refused, UsageError
from khod.handover.record import Owner
from khod.producers.barrier import write_verb
from khod.producers.cgroup import unit_of
from khod.producers.configured import one_line
from khod.producers.conversation import Answer, AnswerWord
from khod.producers.identity import process_of
from khod.producers.peer import Peer, Registration
from khod.server.connection import CONNECTION
from khod.server.producer_interface import Command, Producer, Registered, ShownKind, Word

MAX_FILE_NAME = 255
"""The maximum length of a file's name from a producer, in characters; the record stores it."""
MAX_STOPPED_SECONDS = 86400.0


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
        kind: ShownKind | None = None,
    ) -> Registered:
        connection = CONNECTION.get()
        is_told_early, connection.is_told_early = connection.is_told_early, False
        caller = connection.caller
        if version < 1:
            raise UsageError(f"There is no version {version} of {wire.PRODUCER}", where="version", remedy="Give 1.")
        if connection.producer is not None:
            raise Refused(f"This connection is producer {connection.producer.name}", remedy="Open another one.")
        owner, process = Owner(caller.uid, one_line(unit_of(caller.pid))), process_of(caller.pid)
        if process is None:
            raise Refused("The process that connected has ended", where=f"process {caller.pid}")
        terms = Registration(
            wire.VERB_SECONDS if timeout is None else timeout,
            tuple(after or ()),
            tuple(before or ()),
            tuple(devices or ()),
            (kind or ShownKind.varlink).value,
        )
        if not connection.reserve_producers_place():
            connection.end_after_reply()
            raise Refused(
                "There is no room for another producer", where=name, remedy="LimitNOFILE= of the unit bounds them."
            )
        producer: Peer | None = None
        try:
            producer = await self._engine.register_producer(name, owner, process, terms)
        except Refused:
            # A connection is for one producer; if they were kept open, thousands of them would take the places of
            # others.
            connection.end_after_reply()
            raise
        finally:
            connection.bind_producer(producer)
        if is_told_early:
            producer.conversation.note_told_early()
        connection.on_end.append(partial(self._engine.registry.peers.remove_peer, producer))
        if not connection.is_open:  # it ended during the registration
            self._engine.registry.peers.remove_peer(producer)
        return {"version": wire.PRODUCER_VERSION, "run": producer.claim.run, "told": write_verb(producer.claim.told)}

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
        stopped: float | None = None,
    ) -> Command:
        connection = CONNECTION.get()
        peer = connection.producer
        assert peer is not None, "the rules say so"
        try:
            said = None
            if answer is not None:
                said = _build_answer(serial, answer, reason, progress, names, tokens, fds)
                said = replace(said, stopped_seconds=_check_stopped(stopped))
            command = await peer.conversation.exchange_answer(said)
        except UsageError:
            connection.end_after_reply()
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


def _check_stopped(seconds: float | None) -> float | None:
    if seconds is not None and not 0 <= seconds <= MAX_STOPPED_SECONDS:  # a NaN is refused too
        raise UsageError(f"`stopped` is {seconds}", where="stopped", remedy="Give seconds, 0 or more.")
    return seconds


def _build_answer(
    serial: int | None,
    word: Word,
    reason: str | None,
    progress: float | None,
    names: list[str] | None,
    tokens: list[int] | None,
    fds: list[FileDescriptor] | None,
) -> Answer:
    """Check a producer's answer; raise UsageError if it is not valid."""
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
            raise UsageError(f"The token {token} is not a u64", where=name[:MAX_FILE_NAME])
        if not name or len(name) > MAX_FILE_NAME or not name.isprintable():
            raise UsageError(f"{name[:MAX_FILE_NAME]!r} is not a valid name of a file", where="names")
    if progress is not None and not 0 <= progress <= 1:
        raise UsageError(f"The progress is {progress}", where="progress", remedy="It goes from 0 to 1.")
    files = [(model.Kept(name, token), fd.fileno()) for name, token, fd in zip(names, tokens, fds, strict=True)]
    return Answer(serial, AnswerWord(word.value), one_line(reason or ""), progress, files)
