# SPDX-License-Identifier: LGPL-2.1-or-later
"""The producers that connect, by name: who may register, who is part of a handover, who is expected back."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from khod.errors import Refused
from khod.handover.record import Owner, Process, ProducerRecord
from khod.producers.barrier import Verb
from khod.producers.claim import Claim
from khod.producers.configured import check_name
from khod.producers.identity import is_alive
from khod.producers.peer import AWAITED, KIND, Peer, PeerState, Registration
from khod.producers.registrations import RegisteredProducer, Registrations
from khod.producers.sessions import Sessions

HANG_UP_SECONDS = 1.0
RETURN_SECONDS = 10.0
"""Seconds that a producer whose process lives has to reconnect after a restart of khod; the library tries every
second."""


class Peers:
    """All peers of this host, by name.

    `gone` is called with a peer that disconnects, `came` with one that registers, `late` with one that, in the next
    kernel, answers a command that nobody waits for any more. `registrations` outlives a restart of khod; `unkept` is
    called with the error if it could not be written.
    """

    def __init__(
        self,
        sessions: Sessions,
        gone: Callable[[Peer], None],
        came: Callable[[Peer], None],
        registrations: Registrations | None = None,
        unkept: Callable[[Exception], None] = lambda _error: None,
        late: Callable[[Peer], None] = lambda _peer: None,
    ) -> None:
        self._sessions = sessions
        self._peers: dict[str, Peer] = {}
        self._per_user: Counter[int] = Counter()
        self._naming: dict[str, set[str]] = {}
        """The names of the peers that have a name in `after` or `before`, by that name."""
        self._gone = gone
        self._came = came
        self._registrations = registrations
        self._unkept = unkept
        self._late = late
        self._absent: dict[str, RegisteredProducer] = {}
        self._changed = asyncio.Event()

    def expect_registered(self, boot_id: str) -> None:
        """Expect the producers that an earlier khod of this boot had, until each has returned or is given up."""
        if self._registrations is None:
            return
        try:
            found = self._registrations.load_registered(boot_id)
        except Exception as error:  # noqa: BLE001 - no error here may keep a producer from registering
            self._unkept(error)
            return
        connected = _connected_names(self._peers.values())
        self._absent = {registered.name: registered for registered in found if registered.name not in connected}

    @property
    def absent_producers(self) -> list[RegisteredProducer]:
        """The producers that were registered before khod was restarted, and have not returned."""
        return list(self._absent.values())

    async def wait_returned(self, names: Collection[str], seconds: float = RETURN_SECONDS) -> None:
        """Wait until the absent producers of these names whose process lives have returned, at most `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while any(name in names and is_alive(found.process) for name, found in self._absent.items()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def wait_connected(self, names: Collection[str], seconds: float = RETURN_SECONDS) -> None:
        """Wait until producers of these names are connected, at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not _connected_names(self._peers.values()).issuperset(names):
                    self._changed.clear()
                    await self._changed.wait()

    async def wait_hung_up(self, name: str) -> None:
        """Wait for the end of a connection whose process has ended: the next process may be heard first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_SECONDS):
                while (peer := self.find_peer(name)) is not None and _has_died(peer):
                    self._changed.clear()
                    await self._changed.wait()

    def stop_remembering(self) -> None:
        """Keep the stored registrations as they are: khod ends, and every connection with it."""
        if self._registrations is not None:
            self._registrations.close_file()

    def _keep_registration(self, change: Callable[[Registrations], None]) -> None:
        if self._registrations is not None:
            try:
                change(self._registrations)
            except Exception as error:  # noqa: BLE001 - as above
                self._unkept(error)

    def all_peers(self) -> list[Peer]:
        """Return the peers that are connected or waited for."""
        return [*filter(None, map(self.find_peer, self._peers))]

    def taking_part(self) -> list[Peer]:
        """Return the peers of a handover: those that have nothing to take back from the previous kernel."""
        return [peer for peer in self.all_peers() if not peer.claim.is_restoring]

    def is_awaiting(self, name: str) -> bool:
        """Whether this handover counts on a producer of this name that is not connected."""
        peer = self._peers.get(name)
        return peer is not None and peer.state in AWAITED

    def find_peer(self, name: str) -> Peer | None:
        """Return the peer of this name if it is connected or waited for."""
        peer = self._peers.get(name)
        return peer if peer is not None and peer.state is not PeerState.gone else None

    def peers_naming(self, name: str) -> list[Peer]:
        """Return the connected or awaited peers that must be told before or after this producer."""
        return [*filter(None, map(self.find_peer, self._naming.get(name, ())))]

    def expect_absent(self, run: str) -> None:
        """Count on the producers that have not returned since khod was restarted: any of them may be frozen.

        They stay frozen until they are told an undo.
        """
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
                claim = Claim.from_record(holder, run, self._sessions, restoring=restoring)
                about = (holder.timeout, holder.after, holder.before, holder.devices)
                terms = Registration(*about, holder.shown_kind or KIND)
                owner = holder.owner or Owner(-1, "")
                self._add_peer(Peer(holder.name, owner, holder.process, terms, claim, self._late))

    def give_up(self, name: str) -> bool:
        """Stop expecting a producer that has lost its connection, or had it before khod was restarted.

        Returns whether it was expected. What it was told is then not undone, unless it returns by itself.
        """
        peer = self._peers.get(name)
        awaited = peer is not None and peer.give_up()
        if self._absent.pop(name, None) is None:
            return awaited
        self._changed.set()
        self._keep_registration(lambda registrations: registrations.remove_name(name))
        return True

    def register_peer(self, name: str, owner: Owner, process: Process, terms: Registration, most: int) -> Peer:
        """Register a connection as the producer `name`, at most `most` of them for each user. UsageError or Refused."""
        check_name(name)
        terms.check_values()
        peer = self.find_peer(name)
        if peer is not None and peer.is_reachable:
            raise Refused(f"There is a producer {name} already", where=name, remedy="Choose another name.")
        if peer is not None and peer.state is PeerState.given_up and peer.owner != owner:
            self._delete_peer(peer)  # what its process did belongs to nobody now
            peer = None
        if peer is not None and peer.owner != owner:
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
        awaited = peer.bearer_process if peer is not None and peer.state in AWAITED else None
        for before in (awaited, absent.process if absent is not None else None):
            if before not in (None, process) and is_alive(before):
                # It may be stopped, and frozen: a process that came in its place would be thawed instead.
                raise Refused(
                    f"Process {before.pid} holds the name {name} and has not come back",
                    where=f"process {before.pid}",
                    remedy=f"End it, or: khoctl producers forget {name}",
                )
        if self._per_user[owner.uid] >= most:
            raise Refused(
                f"User {owner.uid} has {most} producers already", where=name, remedy="producers.max_per_user bounds it."
            )
        if peer is None:
            peer = Peer(name, owner, process, terms, Claim(name, self._sessions), self._late)
        elif peer.state is PeerState.expected and peer.bearer_process not in (None, process):
            self._gone(peer)  # the process that was told is dead, and what it held is gone
        self._per_user[owner.uid] += 1
        if (earlier := self._peers.get(name)) is not None:
            self._delete_peer(earlier)
        peer.attach_connection(process, terms)
        self._add_peer(peer)
        self._absent.pop(name, None)
        self._changed.set()
        self._keep_registration(
            lambda registrations: registrations.add_registered(RegisteredProducer(name, owner, process))
        )
        self._came(peer)
        return peer

    def remove_peer(self, peer: Peer) -> None:
        """End the connection of a peer."""
        if not peer.is_reachable:
            return
        self._per_user[peer.owner.uid] -= 1
        peer.detach_connection()
        self._changed.set()
        self._keep_registration(lambda registrations: registrations.remove_name(peer.name))
        if peer.state is PeerState.gone:
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


def _connected_names(peers: Iterable[Peer]) -> set[str]:
    return {peer.name for peer in peers if peer.is_reachable}


def _has_died(peer: Peer) -> bool:
    """Whether a connected peer's process has ended: the end of its connection is still to be seen."""
    return peer.is_reachable and peer.bearer_process is not None and not is_alive(peer.bearer_process)
