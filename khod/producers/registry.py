# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everyone who takes part: the producers with a file, and those that connect."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from khod import model
from khod.errors import ConfigError, Refused, UsageError
from khod.handover.record import Owner, Process, ProducerRecord
from khod.producers.barrier import NOT_RECORDED, Barrier, Member, Participant, PriorCall, Verb, read_verb
from khod.producers.lost import MissingProducer
from khod.producers.order import check_newcomer, order_in_ranks
from khod.producers.peer import Peer, Registration
from khod.producers.peers import Peers
from khod.producers.qemu import Qemu
from khod.producers.unit import Unit

LOG = logging.getLogger(__name__)


class ProducerRegistry:
    """The producers of this host. `configured` reads the files anew each time; ConfigError where one is wrong."""

    def __init__(self, configured: Callable[[], list[Participant]], peers: Peers) -> None:
        self.peers = peers
        self._configured = configured

    def all_producers(self) -> list[Participant]:
        """Every producer that is configured, connected or waited for; whoever has something to claim takes no part.

        ConfigError where a file is wrong, or where somebody is registered under a name that has a file: a handover
        that went without either of them would lose its state.
        """
        files = self._configured()
        for peer in self._shadowed_peers(files):
            where = peer.owner.unit or (f"process {peer.bearer_process.pid}" if peer.bearer_process else "no process")
            raise ConfigError(
                f"Two producers are called {peer.name}: one has a file, the other is registered ({where})",
                where=f"producer {peer.name}",
                remedy=f"Stop {where}, or rename the file in /etc/kho/producers.d.",
            )
        return [*files, *self.peers.taking_part()]

    def _shadowed_peers(self, files: Sequence[Participant]) -> list[Peer]:
        """Those registered under a name that has a file."""
        named = {file.name for file in files}
        return [peer for peer in self.peers.all_peers() if peer.name in named]

    def find_producer(self, name: str) -> Participant:
        """Give a producer by its name; UsageError where there is none."""
        found = next((producer for producer in self.all_producers() if producer.name == name), None)
        if found is None:
            raise UsageError(f"There is no producer {name!r}", where=name, remedy="khoctl producers lists them.")
        return found

    def status_rows(self, told: Sequence[Member]) -> list[model.Producer]:
        """What status says of everyone, in rank order; `told` are those of the last attempt."""
        known = {member.producer.name: member for member in told}
        files, shown = self._configured(), []
        shadowed = self._shadowed_peers(files)
        peers = [peer for peer in self.peers.all_peers() if peer not in shadowed]
        for rank, producers in enumerate(order_in_ranks([*files, *peers])):
            members = [known.get(producer.name) or Member(producer) for producer in producers]
            shown += [replace(member.to_model(), rank=rank) for member in members]
        return shown + [replace(Member(peer).to_model(), answer="there is a file of this name") for peer in shadowed]

    def register_peer(self, name: str, owner: Owner, process: Process, terms: Registration, most: int) -> Peer:
        """Take in a producer that has connected; Refused where its name has a file, ConfigError where it is a cycle."""
        files = self._configured()
        if any(producer.name == name for producer in files):
            raise Refused(f"There is a producer {name} already: it has a file", where=name, remedy="Choose another.")
        named = {file.name: file for file in files}
        naming: dict[str, list[Participant]] = {}
        for file in files:
            for other in {*file.after, *file.before}:
                naming.setdefault(other, []).append(file)
        check_newcomer(
            MissingProducer(name, **vars(terms)),
            lambda one: named.get(one) or self.peers.find_peer(one),
            lambda one: [*naming.get(one, ()), *self.peers.peers_naming(one)],
        )
        return self.peers.register_peer(name, owner, process, terms, most)

    def make_barrier(self, run: str, changed: Callable[[Member], None]) -> Barrier:
        """A barrier for everyone, with nothing told yet."""
        return Barrier.from_producers(self.all_producers(), run, changed)

    def resume_barrier(
        self,
        run: str,
        changed: Callable[[Member], None],
        holders: Sequence[ProducerRecord],
        verb: Verb | None,
        *,
        restoring: bool = False,
    ) -> Barrier:
        """The barrier of an attempt that was begun before, with the producers of its record alone.

        Any of them may have been told `verb`; None where the record has it of each, or nobody was told anything.
        One that is gone, or whose file cannot be read, is said to be: all the others are told. With `restoring` so
        is one that has nothing to restore with any more.
        """
        unreadable: ConfigError | None = None
        try:
            files = self._configured()
        except ConfigError as error:
            files, unreadable = list(error.readable), error
        except Exception as error:
            LOG.exception("the producers' files cannot be read")
            files, unreadable = [], ConfigError(f"The producers' files cannot be read: {error!r}", where="producers.d")
        nobody_knows = not holders and verb is not None  # no record says who: then it may be anyone
        if nobody_knows:
            self.peers.expect_absent(run)
        known = {(producer.name, producer.kind): producer for producer in [*files, *self.peers.all_peers()]}
        if nobody_knows:
            holders = [producer.to_record() for producer in (*files, *self.peers.taking_part())]
        lost = nobody_knows and not run  # as opposed to a record in which nobody stands
        told = {
            holder.name: PriorCall(verb or read_verb(holder.told), NOT_RECORDED if lost else holder.note)
            for holder in holders
        }
        producers: list[Participant] = []
        for holder in holders:
            found = known.get((holder.name, holder.kind))
            found = found or by_note(holder)
            if found is None or (restoring and holder.restores and not found.restores_state):
                found = MissingProducer(
                    holder.name, kind=holder.kind, had_to_restore=bool(holder.restores), unreadable=unreadable
                )
            producers.append(found)
        if restoring:  # whoever has nothing to restore may stand between two that have
            named = {holder.name for holder in holders}
            producers += [file for file in files if not file.restores_state and file.name not in named]
        barrier = Barrier.from_producers(producers, run, changed, told, any_order=True)
        if not producers and unreadable is not None:
            barrier.broken = unreadable  # then there may be somebody in it
        return barrier


def by_note(holder: ProducerRecord) -> Participant | None:
    """Make the producer of a note that says what was done, and to whom: its file need not be there any more."""
    if holder.kind == Unit.kind:
        return Unit.by_note(holder.name, holder.note)
    return Qemu.by_note(holder.name, holder.note) if holder.kind == Qemu.kind else None
