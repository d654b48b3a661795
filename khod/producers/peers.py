# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers that connect: Varlink peers, registered for as long as their connection lives.

A peer is told what to do as the reply to its own call (`Next`), so one connection carries everything,
and who answers is who registered. The end of the connection is a veto. A peer that loses its connection
stays as it is, frozen or not, and connects again: so an undo waits for it, until its process has ended
and what it held with it. Until then its name is nobody else's.
"""

import asyncio
import enum
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from khod.abi.statx import statx
from khod.errors import KhoError, Refused, Unreachable, Unsupported, UsageError
from khod.handover.record import Owner, Process, ProducerRecord
from khod.model import Kept
from khod.producers.barrier import GONE, UNDO, ParticipantVeto, ProducerCall, Verb
from khod.producers.configured import check_name
from khod.producers.identity import is_alive, wait_ended
from khod.producers.registrations import RegisteredProducer, Registrations
from khod.producers.sessions import Sessions, session_of

KIND = "varlink"
Inode = tuple[tuple[int, int], int]
MAX_TIMEOUT_SECONDS = 600.0
"""Seconds a peer may ask for: an undo waits as long for one that hangs."""

MAX_FILES = 1024
MAX_PATH = 255
DEVICE = re.compile(r"/(sys|dev)/[^\0]+")
RETURN_SECONDS = 10.0
"""Seconds a producer whose process lives has to connect again after khod was restarted; the library tries each one."""
MAX_NAMES = 32
"""Names of other producers, or devices, one registration may have: each stands in the record."""


UNDONE_BY = {undo: verb for verb, undo in UNDO.items()}
"""What each undo takes back."""


class HungUp(ParticipantVeto):
    """The connection ended before the answer came."""


@dataclass(frozen=True)
class Registration:
    """What a producer registers with; see `khod.producers.barrier.Participant`. `timeout` is in seconds."""

    timeout: float = 30.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


class AnswerWord(enum.Enum):
    """What a producer answers a verb with."""

    ready = "ready"
    not_yet = "not_yet"
    veto = "veto"


@dataclass(frozen=True)
class Answer:
    """What a producer answers to the command `serial`."""

    serial: int
    word: AnswerWord
    reason: str = ""
    progress: float | None = None
    files: Sequence[tuple[Kept, int]] = ()
    """Files to preserve, with prepare and freeze; the descriptors stay the caller's."""


@dataclass(frozen=True)
class PeerCommand:
    """What a producer is told. `fds` are those of `kept`, with restore; whoever gets the command closes them."""

    serial: int
    verb: Verb
    run: str
    timeout: float
    kept: tuple[Kept, ...] = ()
    fds: tuple[int, ...] = ()


class Peer:
    """One producer by its name, connected or expected to come back.

    One class of this size: a connection that comes or goes in the middle of a verb changes what the barrier, the
    conversation and the claim may do next, and each of them reads the others' state.
    """

    kind = KIND

    def __init__(
        self, name: str, owner: Owner, process: Process | None, terms: Registration, sessions: Sessions
    ) -> None:
        self.name = name
        self.owner = owner
        self.process = process
        self.terms = terms
        self.left: Process | None = None
        """The process whose connection ended after it was told something: what it did stands as long as it lives."""
        self.connected = False
        self.given_up = False
        """Whether the operator gave it up while it was waited for: its name is free for another."""
        self.told = ""
        """The last verb it was told and not told the undo of: what it is reminded of when it comes back."""
        self.kept: tuple[Kept, ...] = ()
        self._with_freeze: dict[Kept, tuple[Inode, ProducerCall]] = {}
        """What freeze has added to its session: which file that is, and the freeze it was given with last."""
        self.run = ""
        self.restoring = False
        """Whether the previous kernel's khod left this entry: whoever claims it comes from another boot."""
        self._taker: Process | None = None
        """The process that was given what the producer left: for that one only `finish` is due."""
        self.late: Callable[[], None] = lambda: None
        """Called when it answers, in the next kernel, what nobody waited for any more."""
        self._sessions = sessions
        self._serial = 0
        self._telling: ProducerCall | None = None
        self._delivered = 0
        self._answer: asyncio.Future[None] | None = None
        self._news = asyncio.Event()
        self._back = asyncio.Event()

    @classmethod
    def expect_holder(cls, holder: ProducerRecord, run: str, sessions: Sessions, *, restoring: bool) -> "Peer":
        """Make the entry of a producer that an earlier khod knew."""
        terms = Registration(holder.timeout, holder.after, holder.before, holder.devices)
        made = cls(holder.name, holder.owner or Owner(-1, ""), holder.process, terms, sessions)
        # The record is written before anyone is told: whoever stands in it may have been told to prepare.
        told = {"": Verb.prepare.value, Verb.cancel.value: ""}.get(holder.told, holder.told)
        if restoring and told == Verb.finish.value:
            made._taker = holder.process
        elif restoring:
            told = Verb.restore.value
        made.told = told
        made.kept, made.run, made.restoring = holder.kept, run, restoring
        return made

    def to_record(self) -> ProducerRecord:
        """What the record says of it; the barrier adds what it was told."""
        return ProducerRecord(
            self.name, KIND, owner=self.owner, process=self.bearer_process, kept=self.kept, **vars(self.terms)
        )

    @property
    def bearer_process(self) -> Process | None:
        """The process that did what it was told, be it connected or not; None where none is known."""
        return self.process or self.left

    @property
    def timeout(self) -> float:
        return self.terms.timeout

    @property
    def after(self) -> tuple[str, ...]:
        return self.terms.after

    @property
    def before(self) -> tuple[str, ...]:
        return self.terms.before

    @property
    def devices(self) -> tuple[str, ...]:
        return self.terms.devices

    @property
    def restores_state(self) -> bool:
        return True

    @property
    def is_reachable(self) -> bool:
        return self.connected

    @property
    def counted_on(self) -> bool:
        """Whether it is of this handover or has something to claim, be it connected or not: its name is its own."""
        return bool(self.told) or self.restoring

    @property
    def is_awaited(self) -> bool:
        """Whether it was told something in this boot, and is not connected."""
        return bool(self.told) and not self.restoring and not self.connected

    @property
    def session_name(self) -> str:
        """The name of its LUO session in this handover."""
        return session_of(self.run, self.name)

    # What the barrier does

    async def carry_out(self, telling: ProducerCall) -> str | None:
        verb, self.run = telling.verb, telling.run
        while here := self.connected or await self._comes_back(telling):
            if verb is Verb.finish and self._taker != self.process:  # what was given died with the one that took it
                await self._await_answer(replace(telling, verb=Verb.restore))
            if verb is Verb.freeze and self.kept and self.session_name not in self._sessions.session_names:
                raise ParticipantVeto(
                    "what it handed over before is preserved no more: it must be told to prepare again"
                )
            try:
                await self._await_answer(telling)
                break
            except HungUp:
                if verb not in UNDONE_BY:
                    raise
        if verb is Verb.freeze:
            stale = {*self._earlier_files(telling).values()}
            self.kept = tuple(kept for kept in self.kept if kept not in stale)
        self._taker = self.process if verb is Verb.restore else None
        if verb is Verb.cancel:
            self._sessions.close_session(self.session_name)
            self.kept, self._with_freeze = (), {}
        elif verb is Verb.finish:
            await self._sessions.finish_session(self.session_name, self.timeout)
            self.kept, self.restoring = (), False
        self.told = {Verb.thaw: Verb.prepare.value, Verb.cancel: "", Verb.finish: ""}.get(verb, verb.value)
        return None if here else GONE

    async def _await_answer(self, telling: ProducerCall) -> None:
        """Give the command and wait for the answer to it."""
        self._serial += 1
        self._telling, self._answer = telling, asyncio.get_running_loop().create_future()
        self.told = telling.verb.value
        self._news.set()
        try:
            await self._answer
        finally:
            self._answer = None
            if telling.verb not in UNDONE_BY:
                # An undo that was not answered in time stays: whoever comes late hears it, whatever it says.
                self._telling = None

    async def make_way(self, note: str) -> None:
        """Nothing: its process gets the shutdown's signals."""

    async def wait_returned(self) -> None:
        if not self.connected and (self.process is None or not await self._back_or_gone()):
            raise ParticipantVeto("it is gone")

    async def _comes_back(self, telling: ProducerCall) -> bool:
        """Wait for a connection; False where there is nobody to tell and nothing to undo."""
        undo = telling.verb in UNDONE_BY
        bearer = self.bearer_process if undo else self.process
        if bearer is None and not self.restoring:
            if undo:
                return False
            raise ParticipantVeto("its connection ended")
        reason = "it has not connected yet"
        if bearer is not None and undo:  # it stands in the error where neither comes to pass in time
            state = "frozen" if telling.verb is Verb.thaw else "prepared"
            reason = f"process {bearer.pid} is {state}, alive and not connected"
        telling.not_yet(reason, None)
        if await self._back_or_gone():
            return True
        if undo:
            return False
        raise ParticipantVeto("its process ended")

    async def _back_or_gone(self) -> bool:
        """Wait for its connection or the end of its process; whether it is connected."""
        back = asyncio.ensure_future(self._back.wait())
        gone = asyncio.ensure_future(wait_ended(None if self.restoring else self.bearer_process))
        try:
            await asyncio.wait({back, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (back, gone):
                task.cancel()
        return self.connected

    # What the connection does

    def attach_connection(self, process: Process, terms: Registration) -> None:
        """A connection has come for this entry."""
        if self._taker not in (None, process):
            self.told = Verb.restore.value
        self.process, self.left, self.terms, self.connected = process, None, terms, True
        self._telling, self._delivered = None, 0
        self._back.set()

    def detach_connection(self) -> None:
        """The connection has ended: whatever it was told is answered with a veto, an undo is still to be told."""
        if self._answer is not None and self._telling is not None and self._telling.verb in UNDONE_BY:
            self.told = UNDONE_BY[self._telling.verb].value
        self.left = self.process if self.told and not self.restoring else None
        self.connected, self.process = False, None
        self._back.clear()
        self._news.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(HungUp("its connection ended"))

    async def exchange_answer(self, answer: Answer | None) -> PeerCommand:
        """Take an answer, then wait for the next command; Unreachable where the connection ends meanwhile."""
        if answer is not None:
            repeat = await self._take_answer(answer)
            if repeat is not None:
                return repeat
        while self.connected:
            self._news.clear()
            if self._telling is not None and self._delivered != self._serial:
                self._delivered = self._serial
                return await self._make_command(self._telling)
            await self._news.wait()
        raise Unreachable("The connection has ended")

    async def _take_answer(self, answer: Answer) -> PeerCommand | None:
        """Pass an answer on; the same command again where it was `not_yet`. A late one counts for nothing."""
        future, telling = self._answer, self._telling
        if future is None or future.done() or telling is None or answer.serial != self._serial:
            if self.restoring and future is None:
                if answer.word is AnswerWord.not_yet:  # nobody waits, and nobody undoes it either: let it go on
                    return PeerCommand(answer.serial, Verb.restore, self.run, self.timeout)
                self.late()  # it is told again: it has no cause to connect again
            return None
        if answer.word is AnswerWord.not_yet:
            telling.not_yet(answer.reason, answer.progress)
        if answer.files:
            try:
                await self._preserve_files(telling, answer.files)
            except Unsupported as error:
                _fail_future(future, error)
            except KhoError as error:
                _fail_future(future, ParticipantVeto(str(error)))
        if answer.word is AnswerWord.not_yet:
            return PeerCommand(self._serial, telling.verb, telling.run, self.timeout)
        if not future.done():
            if answer.word is AnswerWord.ready:
                future.set_result(None)
            else:
                future.set_exception(ParticipantVeto(answer.reason or "no reason given"))
        return None

    async def _preserve_files(self, telling: ProducerCall, files: Sequence[tuple[Kept, int]]) -> None:
        if telling.verb not in UNDO:
            raise UsageError(f"Files are handed over with prepare and freeze, not with {telling.verb.value}")
        inodes = {kept: _inode_of(file) for kept, file in files} if telling.verb is Verb.freeze else {}
        earlier = self._earlier_files(telling)
        again = {kept: earlier[kept.name, inode] for kept, inode in inodes.items() if (kept.name, inode) in earlier}
        new = [(kept, file) for kept, file in files if kept not in again]
        there = {*self.kept, *self._with_freeze}
        if len(there) + len(new) > MAX_FILES:
            raise UsageError(f"More than {MAX_FILES} files", remedy="Put more into one memfd.")
        given = [kept for kept, _ in files]
        names = [kept.name for kept in (*there.difference(earlier.values()), *given)]
        tokens = [kept.token for kept in (*there, *(kept for kept, _ in new))]
        for what, values in (("name", names), ("token", tokens)):
            if twice := sorted(str(value) for value, count in Counter(values).items() if count > 1):
                raise UsageError(f"The {what} {twice[0]!r} is given to two files", remedy="Give each its own.")
        session = self.session_name
        if new:
            await self._sessions.preserve_files(session, new, self.timeout)
        called_off = self._telling is not telling  # it took long
        if called_off and (telling.verb is Verb.prepare or not self.told or session != self.session_name):
            self._sessions.close_session(session)
            return
        result = [again.get(kept, kept) for kept in given]
        self._with_freeze |= {again.get(kept, kept): (inode, telling) for kept, inode in inodes.items()}
        if not called_off:
            self.kept = (*(kept for kept in self.kept if kept.name not in {one.name for one in given}), *result)

    def _earlier_files(self, telling: ProducerCall) -> dict[tuple[str, Inode], Kept]:
        """What its session has from a freeze before this one, by the name and the file.

        The kernel lets go of a session only as a whole, and khod has no descriptors with which to preserve again what
        came with prepare. So thaw leaves in it what freeze has added, and the next freeze (after --hold) may give it
        once more: the same file is not preserved twice and keeps its token, another one takes the place of its name.
        What is not given once more arrives with the session and is given to nobody.
        """
        return {(kept.name, inode): kept for kept, (inode, by) in self._with_freeze.items() if by is not telling}

    async def _make_command(self, telling: ProducerCall) -> PeerCommand:
        command = PeerCommand(self._serial, telling.verb, telling.run, self.timeout)
        if telling.verb is not Verb.restore or not self.kept:
            return command
        try:
            fds = await self._sessions.retrieve_files(self.session_name, self.kept, self.timeout)
        except KhoError as error:
            if self._answer is not None:
                _fail_future(self._answer, ParticipantVeto(str(error)))
            raise
        return replace(command, kept=self.kept, fds=tuple(fds))


def _inode_of(file: int) -> Inode:
    found = statx(file)
    return found.dev, found.ino


def _fail_future(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


class Peers:
    """All peers of this host, by name.

    `gone` is called with one that leaves, `came` with one that registers. `registrations` outlives a restart of
    khod; `unkept` is called where it could not be written.
    """

    def __init__(
        self,
        sessions: Sessions,
        gone: Callable[[Peer], None],
        came: Callable[[Peer], None],
        registrations: Registrations | None = None,
        unkept: Callable[[Exception], None] = lambda _error: None,
    ) -> None:
        self._sessions = sessions
        self._peers: dict[str, Peer] = {}
        self._per_user: Counter[int] = Counter()
        self._naming: dict[str, set[str]] = {}
        """Who names somebody in `after` or `before`, by the name that is named."""
        self._gone = gone
        self._came = came
        self._registrations = registrations
        self._unkept = unkept
        self._absent: dict[str, RegisteredProducer] = {}
        self._returned = asyncio.Event()

    def expect_registered(self, boot_id: str) -> None:
        """Expect those that an earlier khod of this boot had, until each has come back or is given up."""
        if self._registrations is None:
            return
        try:
            found = self._registrations.load_registered(boot_id)
        except Exception as error:  # noqa: BLE001 - whatever it is: nobody is kept from registering by it
            self._unkept(error)
            return
        self._absent = {
            registered.name: registered for registered in found if registered.name not in self._connected_names()
        }

    @property
    def absent_producers(self) -> list[RegisteredProducer]:
        """Those that were registered before khod was restarted, and have not come back."""
        return list(self._absent.values())

    async def wait_returned(self, names: Collection[str], seconds: float = RETURN_SECONDS) -> None:
        """Wait until those absent of these names whose process lives have come back, and no longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while any(name in names and is_alive(found.process) for name, found in self._absent.items()):
                    self._returned.clear()
                    await self._returned.wait()
        except TimeoutError:
            return

    def _connected_names(self) -> set[str]:
        return {name for name, peer in self._peers.items() if peer.connected}

    def stop_remembering(self) -> None:
        """Keep the registrations as they are: khod ends, and every connection with it."""
        if self._registrations is not None:
            self._registrations.close_file()

    def _keep_registration(self, change: Callable[[Registrations], None]) -> None:
        if self._registrations is not None:
            try:
                change(self._registrations)
            except Exception as error:  # noqa: BLE001 - as above
                self._unkept(error)

    def all_peers(self) -> list[Peer]:
        """Those connected, and those that are waited for."""
        return [*filter(None, map(self.find_peer, self._peers))]

    def taking_part(self) -> list[Peer]:
        """Those of a handover: not whoever has not taken back yet what the previous kernel's khod left here."""
        return [peer for peer in self.all_peers() if not peer.restoring]

    def is_awaiting(self, name: str) -> bool:
        """Whether this handover counts on a producer of this name that is not connected."""
        peer = self._peers.get(name)
        return peer is not None and peer.is_awaited

    def find_peer(self, name: str) -> Peer | None:
        """One that is connected or waited for, by its name."""
        peer = self._peers.get(name)
        return peer if peer is not None and (peer.connected or peer.counted_on) else None

    def peers_naming(self, name: str) -> list[Peer]:
        """Those that are connected or waited for and want to be told before or after this producer."""
        return [*filter(None, map(self.find_peer, self._naming.get(name, ())))]

    def expect_absent(self, run: str) -> None:
        """Count on those that have not come back since khod was restarted: any of them may be frozen, and stays so."""
        about = {"told": Verb.freeze.value, **vars(Registration())}
        holders = [
            ProducerRecord(one.name, KIND, owner=one.owner, process=one.process, **about)
            for one in self.absent_producers
        ]
        self.expect_holders(holders, run, restoring=False)

    def expect_holders(self, holders: Iterable[ProducerRecord], run: str, *, restoring: bool) -> None:
        """Wait for producers that an earlier khod knew, of this boot or (`restoring`) of the one before."""
        for holder in holders:
            if holder.kind == KIND and holder.name not in self._peers:
                self._add_peer(Peer.expect_holder(holder, run, self._sessions, restoring=restoring))

    def give_up(self, name: str) -> bool:
        """Expect a producer back no more that has lost its connection, or had it before khod was restarted.

        Whether it was expected. What it was told is not undone then where it does not come back by itself.
        """
        peer = self._peers.get(name)
        awaited = peer is not None and peer.is_awaited and peer.bearer_process is not None
        if peer is not None and awaited:
            peer.process = peer.left = None
            peer.given_up = True
        if self._absent.pop(name, None) is None:
            return awaited
        self._returned.set()
        self._keep_registration(lambda registrations: registrations.remove_name(name))
        return True

    async def forget_claim(self, name: str, deadline: float) -> None:
        """Free what a producer left before the jump; nothing where it left nothing."""
        peer = self._peers.get(name)
        if peer is not None and peer.restoring:
            await self._sessions.drop_session(peer.session_name, deadline)
            peer.restoring, peer.told, peer.kept = False, "", ()

    def register_peer(self, name: str, owner: Owner, process: Process, terms: Registration, most: int) -> Peer:
        """Take a connection in as the producer `name`, at `most` so many of one user's. UsageError or Refused."""
        check_name(name)
        _check_terms(terms)
        peer = self._peers.get(name)
        if peer is not None and peer.connected:
            raise Refused(f"There is a producer {name} already", where=name, remedy="Choose another name.")
        if peer is not None and peer.given_up and peer.owner != owner:  # what its process did is nobody's any more
            self._delete_peer(peer)
            peer = None
        if peer is not None and peer.counted_on and peer.owner != owner:
            raise Refused(
                f"Producer {name} is user {peer.owner.uid}'s in {peer.owner.unit or 'no unit'}, "
                f"and this is user {owner.uid} in {owner.unit or 'no unit'}",
                where=name,
                remedy="Run it in the same unit as before, or: khoctl producers forget NAME",
            )
        if (absent := self._absent.get(name)) is not None and absent.owner != owner:
            raise Refused(
                f"Producer {name} was user {absent.owner.uid}'s in {absent.owner.unit or 'no unit'} before khod was "
                f"restarted, and this is user {owner.uid} in {owner.unit or 'no unit'}",
                where=name,
                remedy="Run it in the same unit as before, or: khoctl producers forget NAME",
            )
        awaited = peer.bearer_process if peer is not None and peer.is_awaited else None
        for before in (awaited, absent.process if absent is not None else None):
            if before not in (None, process) and is_alive(before):
                # It may be stopped, and frozen: another that came in its stead would be thawed for it.
                raise Refused(
                    f"Process {before.pid} holds the name {name} and has not come back",
                    where=f"process {before.pid}",
                    remedy=f"End it, or: khoctl producers forget {name}",
                )
        if self._per_user[owner.uid] >= most:
            raise Refused(
                f"User {owner.uid} has {most} producers already", where=name, remedy="producers.max_per_user bounds it."
            )
        earlier = peer
        if peer is None or not peer.counted_on:
            peer = Peer(name, owner, process, terms, self._sessions)
        elif peer.told and not peer.restoring and peer.process not in (None, process):
            self._gone(peer)  # the process that was told is dead, and what it held with it
        self._per_user[owner.uid] += 1
        if earlier is not None:
            self._delete_peer(earlier)
        peer.attach_connection(process, terms)
        self._add_peer(peer)
        self._absent.pop(name, None)
        self._returned.set()
        self._keep_registration(
            lambda registrations: registrations.add_registered(RegisteredProducer(name, owner, process))
        )
        self._came(peer)
        return peer

    def remove_peer(self, peer: Peer) -> None:
        """Its connection has ended."""
        if not peer.connected:
            return
        self._per_user[peer.owner.uid] -= 1
        peer.detach_connection()
        self._keep_registration(lambda registrations: registrations.remove_name(peer.name))
        if not peer.counted_on:
            self._delete_peer(peer)
        self._gone(peer)

    def _add_peer(self, peer: Peer) -> None:
        self._peers[peer.name] = peer
        for name in (*peer.after, *peer.before):
            self._naming.setdefault(name, set()).add(peer.name)

    def _delete_peer(self, peer: Peer) -> None:
        del self._peers[peer.name]
        for name in {*peer.after, *peer.before}:
            self._naming[name].discard(peer.name)
            if not self._naming[name]:
                del self._naming[name]


def _check_terms(terms: Registration) -> None:
    if not 0 < terms.timeout <= MAX_TIMEOUT_SECONDS:  # a NaN is neither
        raise UsageError(
            f"The timeout is {terms.timeout}",
            where="timeout",
            remedy=f"Give seconds, more than 0 and at most {MAX_TIMEOUT_SECONDS:g}.",
        )
    for what, names in (("after", terms.after), ("before", terms.before)):
        for other in names:
            check_name(other)
        _check_count(what, names)
    for device in terms.devices:
        if not DEVICE.fullmatch(device) or ".." in device.split("/") or len(device) > MAX_PATH:
            raise UsageError(
                f"{device[:80]!r} is not a device", where="devices", remedy="Give a path below /sys or /dev."
            )
    _check_count("devices", terms.devices)


def _check_count(what: str, names: Sequence[str]) -> None:
    if len(names) > MAX_NAMES:
        raise UsageError(f"{len(names)} names in `{what}`", where=what, remedy=f"Give at most {MAX_NAMES}.")
