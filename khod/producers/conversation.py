# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands and answers on a producer's connection: a command is the reply to the call that answers the last one."""

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import replace

from khod.dataclass import dataclass
from khod.errors import KhoError, Unreachable, Unsupported
from khod.model import Kept
from khod.producers.barrier import UNDONE_BY, ParticipantVeto, ProducerCall, Verb
from khod.producers.claim import Claim
from khod.wire import FIRST_SERIAL


class HungUp(ParticipantVeto):
    """The connection ended before the answer came."""


class AnswerWord(enum.Enum):
    """The word with which a producer answers a verb."""

    ready = "ready"
    not_yet = "not_yet"
    veto = "veto"


@dataclass(frozen=True)
class Answer:
    """The answer of a producer to the command `serial`."""

    serial: int
    word: AnswerWord
    reason: str = ""
    progress: float | None = None
    files: Sequence[tuple[Kept, int]] = ()
    """Files to preserve, with prepare and freeze; the descriptors stay the caller's."""
    stopped_seconds: float | None = None


@dataclass(frozen=True)
class PeerCommand:
    """A command for a producer. With restore, `fds` are the descriptors of `kept`; the receiver closes them."""

    serial: int
    verb: Verb
    run: str
    timeout: float
    kept: tuple[Kept, ...] = ()
    fds: tuple[int, ...] = ()


class Conversation:
    """The commands and answers of one producer, over all its connections: no serial is used twice.

    `late` is called when, in the next kernel, it answers a command that nobody waits for any more.
    """

    def __init__(self, claim: Claim, late: Callable[[], None]) -> None:
        self._claim = claim
        self._late = late
        self._is_open = False
        self._timeout = 0.0
        self._serial = 0
        self._telling: ProducerCall | None = None
        self._delivered = 0
        self._is_told_early = False
        self._answer: asyncio.Future[None] | None = None
        self._news = asyncio.Event()

    def open_connection(self, timeout: float) -> None:
        """Begin a new connection; `timeout` is the seconds that the producer has for each verb."""
        self._is_open, self._timeout = True, timeout
        self._telling, self._delivered, self._is_told_early = None, 0, False

    def note_told_early(self) -> None:
        """Note that the early restore has sent `restore` on this connection, as the first command of all."""
        if self._serial < FIRST_SERIAL:  # otherwise the answer is to a command of before, and it is told again
            self._serial, self._is_told_early = FIRST_SERIAL, True

    def hang_up(self) -> Verb | None:
        """End the connection: the command under way fails with HungUp. Return the verb that was not answered."""
        unanswered = self._telling.verb if self._answer is not None and self._telling is not None else None
        self._is_open = False
        self._news.set()
        if self._answer is not None:
            _fail_future(self._answer, HungUp("its connection ended"))
        return unanswered

    async def give_command(self, telling: ProducerCall) -> None:
        """Give a command and wait for the answer; ParticipantVeto if it is a refusal."""
        if self._is_told_early and telling.verb is Verb.restore:
            self._delivered = self._serial
        else:
            self._serial += 1
        self._is_told_early = False
        self._telling, self._answer = telling, asyncio.get_running_loop().create_future()
        self._claim.begin_verb(telling.verb)
        self._news.set()
        try:
            await self._answer
        finally:
            self._answer = None
            if telling.verb not in UNDONE_BY:
                # An undo that was not answered in time stays: a producer that comes late is told it, whatever it has to
                # say.
                self._telling = None

    async def exchange_answer(self, answer: Answer | None) -> PeerCommand:
        """Take an answer, then wait for the next command and return it; Unreachable if the connection ends before."""
        while self._is_open and self._is_told_early:  # the answer is to a command that is still to be given here
            self._news.clear()
            await self._news.wait()
        if answer is not None:
            repeat = await self._take_answer(answer)
            if repeat is not None:
                return repeat
        while self._is_open:
            self._news.clear()
            if self._telling is not None and self._delivered != self._serial:
                self._delivered = self._serial
                return await self._make_command(self._telling)
            await self._news.wait()
        raise Unreachable("The connection has ended")

    async def _take_answer(self, answer: Answer) -> PeerCommand | None:
        """Pass an answer on; return the same command again if it was `not_yet`. A late answer is ignored."""
        future, telling = self._answer, self._telling
        if future is None or future.done() or telling is None or answer.serial != self._serial:
            if self._claim.is_restoring and future is None:
                if answer.word is AnswerWord.not_yet:  # nobody waits for it, and nobody undoes it: it may continue
                    return PeerCommand(answer.serial, Verb.restore, self._claim.run, self._timeout)
                self._late()  # it is told again, because it has no reason to reconnect
            return None
        if answer.word is AnswerWord.not_yet:
            telling.not_yet(answer.reason, answer.progress)
        if answer.files:
            try:
                await self._claim.preserve_files(
                    telling, answer.files, self._timeout, lambda: self._telling is not telling
                )
            except Unsupported as error:
                _fail_future(future, error)
            except KhoError as error:
                _fail_future(future, ParticipantVeto(str(error)))
        if answer.word is AnswerWord.not_yet:
            return PeerCommand(self._serial, telling.verb, telling.run, self._timeout)
        if not future.done():
            if answer.word is AnswerWord.ready:
                telling.stopped_seconds = answer.stopped_seconds
                future.set_result(None)
            else:
                future.set_exception(ParticipantVeto(answer.reason or "no reason given"))
        return None

    async def _make_command(self, telling: ProducerCall) -> PeerCommand:
        command = PeerCommand(self._serial, telling.verb, telling.run, self._timeout)
        if telling.verb is not Verb.restore or not self._claim.kept:
            return command
        try:
            fds = await self._claim.retrieve_files(self._timeout)
        except KhoError as error:
            if self._answer is not None:
                _fail_future(self._answer, ParticipantVeto(str(error)))
            raise
        return replace(command, kept=self._claim.kept, fds=tuple(fds))


def _fail_future(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
