# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a connected producer was told and has handed over; while that stands, its name is not given to another."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from khod.abi.statx import statx
from khod.errors import UsageError
from khod.handover.record import Process, ProducerRecord
from khod.handover.session_names import session_of
from khod.model import Kept
from khod.producers.barrier import UNDO, UNDONE_BY, ParticipantVeto, ProducerCall, Verb, read_verb
from khod.producers.contents import KeptFiles
from khod.producers.sessions import Sessions

Inode = tuple[tuple[int, int], int]
MAX_FILES = 1024


class Claim:
    """The state of one producer in a handover, of this boot or (`is_restoring`) of the boot before.

    Its files are in a LUO session of its own. Methods with a `deadline`, in seconds, raise what `Sessions` raises.
    """

    def __init__(self, producer: str, sessions: Sessions) -> None:
        self._producer = producer
        self._sessions = sessions
        self._run = ""
        self._told: Verb | None = None
        self._kept: tuple[Kept, ...] = ()
        self._with_freeze: dict[Kept, tuple[Inode, ProducerCall]] = {}
        """What freeze has added to its session: the inode of each file, and the freeze that gave it last."""
        self._is_restoring = False
        self._taker: Process | None = None
        """The process that was given what the producer left: only this one may be told `finish` without another
        `restore`."""

    @classmethod
    def from_record(cls, holder: ProducerRecord, run: str, sessions: Sessions, *, restoring: bool) -> "Claim":
        """Return the claim of a producer that an earlier khod knew."""
        made = cls(holder.name, sessions)
        # The record is written before any producer is told: a producer in it may have been told to prepare.
        told = read_verb(holder.told) or Verb.prepare
        if restoring and told is Verb.finish:
            made._taker = holder.process
        elif restoring:
            told = Verb.restore
        made._told = None if told is Verb.cancel else told
        made._run, made._kept, made._is_restoring = run, holder.kept, restoring
        return made

    @property
    def told(self) -> Verb | None:
        """The last verb that it was told, and not told the undo of: it is reminded of that when it returns."""
        return self._told

    @property
    def run(self) -> str:
        """The handover in which it was last told something."""
        return self._run

    @property
    def kept(self) -> tuple[Kept, ...]:
        """The files it has handed over."""
        return self._kept

    @property
    def is_restoring(self) -> bool:
        """Whether the khod of the previous kernel left this: the process that claims it is from another boot."""
        return self._is_restoring

    @property
    def session_name(self) -> str:
        """The name of its LUO session in this handover."""
        return session_of(self._run, self._producer)

    # What it is told

    def enter_run(self, run: str) -> None:
        """Continue in this handover."""
        self._run = run

    def begin_verb(self, verb: Verb) -> None:
        """Note a verb from the moment it is told. What was read of its files is void once it may write to them."""
        if verb is Verb.freeze:
            self._kept = tuple(replace(kept, spot=None) for kept in self._kept)
        self._told = verb

    def note_unanswered(self, verb: Verb | None) -> None:
        """Note that the connection ended before `verb` was answered: an undo must be told again."""
        if verb in UNDONE_BY:
            self._told = UNDONE_BY[verb]

    def note_connected(self, process: Process) -> None:
        """Note which process has connected: what was given to another process must be given again."""
        if self._taker not in (None, process):
            self._told = Verb.restore

    def was_given_to(self, process: Process | None) -> bool:
        """Whether this process has what the producer left; what a process was given is lost when it dies."""
        return self._taker == process

    async def settle_verb(self, telling: ProducerCall, process: Process | None, deadline: float) -> None:
        """Note that `process` has carried a verb out, and free what is no longer needed."""
        verb = telling.verb
        if verb is Verb.freeze:
            stale = {*self._earlier_files(telling).values()}
            self._kept = tuple(kept for kept in self._kept if kept not in stale)
        self._taker = process if verb is Verb.restore else None
        if verb is Verb.cancel:
            self._sessions.close_session(self.session_name)
            self._kept, self._with_freeze = (), {}
        elif verb is Verb.finish:
            await self._sessions.finish_session(self.session_name, deadline)
            self._kept, self._is_restoring = (), False
        self._told = {Verb.thaw: Verb.prepare, Verb.cancel: None, Verb.finish: None}.get(verb, verb)

    async def drop_arrived(self, deadline: float) -> None:
        """Free what the producer left before the jump; without effect if it left nothing."""
        if self._is_restoring:
            await self._sessions.drop_session(self.session_name, deadline)
            self._is_restoring, self._told, self._kept = False, None, ()

    # Its files

    def require_preserved(self) -> None:
        """Raise ParticipantVeto if the files it has handed over are no longer preserved."""
        if self._kept and self.session_name not in self._sessions.session_names:
            raise ParticipantVeto("what it handed over before is preserved no more: it must be told to prepare again")

    async def preserve_files(
        self,
        telling: ProducerCall,
        files: Sequence[tuple[Kept, int]],
        deadline: float,
        is_called_off: Callable[[], bool],
    ) -> None:
        """Preserve the files handed over with a verb, unless the verb is cancelled; UsageError if they are not valid.

        `is_called_off` returns whether the verb was cancelled.
        """
        if telling.verb not in UNDO:
            raise UsageError(f"Files are handed over with prepare and freeze, not with {telling.verb.value}")
        inodes = {kept: _inode_of(file) for kept, file in files} if telling.verb is Verb.freeze else {}
        earlier = self._earlier_files(telling)
        again = {kept: earlier[kept.name, inode] for kept, inode in inodes.items() if (kept.name, inode) in earlier}
        new = [(kept, file) for kept, file in files if kept not in again]
        there = {*self._kept, *self._with_freeze}
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
            await self._sessions.preserve_files(session, new, deadline)
        called_off = is_called_off()  # preserving them may take long
        if called_off and (telling.verb is Verb.prepare or not self._told or session != self.session_name):
            self._sessions.close_session(session)
            return
        result = [again.get(kept, kept) for kept in given]
        self._with_freeze |= {again.get(kept, kept): (inode, telling) for kept, inode in inodes.items()}
        if not called_off:
            self._kept = (*(kept for kept in self._kept if kept.name not in {one.name for one in given}), *result)

    def _earlier_files(self, telling: ProducerCall) -> dict[tuple[str, Inode], Kept]:
        """Return what its session has from an earlier freeze, by the name and the inode.

        The kernel releases a session only as a whole, and khod has no descriptors with which to preserve again what
        came with prepare. So thaw leaves in the session what freeze has added, and the next freeze (after --hold) may
        give it again: the same file is not preserved twice and keeps its token, another file takes the place of its
        name. A file that is not given again arrives with the session, and is given to nobody.
        """
        return {(kept.name, inode): kept for kept, (inode, by) in self._with_freeze.items() if by is not telling}

    def note_spots(self, kept: tuple[Kept, ...]) -> None:
        """Note what was read of its files, unless it has handed over others since."""
        if kept == self._kept:
            self._kept = kept

    async def retrieve_files(self, deadline: float) -> list[int]:
        """Return descriptors of the files that it left in the previous kernel; they are the caller's.

        Their contents were compared by then.
        """
        kept_files = self._sessions.kept_files
        fds = await self._sessions.retrieve_files(self.session_name, self._kept, deadline)
        try:
            await kept_files.compare_files(self._producer, self._kept, fds, deadline)
        except BaseException:
            kept_files.close_fds(fds)
            raise
        return fds


async def read_frozen_files(kept_files: KeptFiles, claims: Iterable[Claim]) -> None:
    """Read pages of the files of every producer that is frozen, for the record: the next khod compares them."""
    frozen = {claim.session_name: claim for claim in claims if claim.told is Verb.freeze}
    spots = await kept_files.take_spots({session: claim.kept for session, claim in frozen.items()})
    for session, kept in spots.items():
        frozen[session].note_spots(kept)


def _inode_of(file: int) -> Inode:
    found = statx(file)
    return found.dev, found.ino
