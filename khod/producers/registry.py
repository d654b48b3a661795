"""Everyone who takes part: the producers with a file, and those that connect."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from khod import model
from khod.errors import ConfigError, Refused, UsageError
from khod.handover.record import Holder, Owner, Process
from khod.producers.barrier import NOT_RECORDED, Barrier, Member, Producer, Told, Verb
from khod.producers.lost import Lost
from khod.producers.order import check_newcomer, ranks
from khod.producers.peers import Peer, Peers, Terms
from khod.producers.qemu import Qemu
from khod.producers.unit import Unit

LOG = logging.getLogger(__name__)


class Muster:
    """The producers of this host. `configured` reads the files anew each time; ConfigError where one is wrong."""

    def __init__(self, configured: Callable[[], list[Producer]], peers: Peers) -> None:
        self.peers = peers
        self._configured = configured

    def everyone(self) -> list[Producer]:
        """Every producer that is configured, connected or waited for; whoever has something to claim takes no part.

        ConfigError where a file is wrong, or where somebody is registered under a name that has a file: a handover
        that went without either of them would lose its state.
        """
        files = self._configured()
        for peer in self._shadowed(files):
            where = peer.owner.unit or (f"process {peer.bearer.pid}" if peer.bearer else "no process")
            raise ConfigError(
                f"Two producers are called {peer.name}: one has a file, the other is registered ({where})",
                where=f"producer {peer.name}",
                remedy=f"Stop {where}, or rename the file in /etc/kho/producers.d.",
            )
        return [*files, *self.peers.taking_part()]

    def _shadowed(self, files: Sequence[Producer]) -> list[Peer]:
        """Those registered under a name that has a file."""
        named = {file.name for file in files}
        return [peer for peer in self.peers.known() if peer.name in named]

    def find(self, name: str) -> Producer:
        """Give a producer by its name; UsageError where there is none."""
        found = next((producer for producer in self.everyone() if producer.name == name), None)
        if found is None:
            raise UsageError(f"There is no producer {name!r}", where=name, remedy="khoctl producers lists them.")
        return found

    def shown(self, told: Sequence[Member]) -> list[model.Producer]:
        """What status says of everyone, in rank order; `told` are those of the last attempt."""
        known = {member.producer.name: member for member in told}
        files, shown = self._configured(), []
        shadowed = self._shadowed(files)
        peers = [peer for peer in self.peers.known() if peer not in shadowed]
        for rank, producers in enumerate(ranks([*files, *peers])):
            members = [known.get(producer.name) or Member(producer) for producer in producers]
            shown += [replace(member.shown(), rank=rank) for member in members]
        return shown + [replace(Member(peer).shown(), answer="there is a file of this name") for peer in shadowed]

    def register(self, name: str, owner: Owner, process: Process, terms: Terms, most: int) -> Peer:
        """Take in a producer that has connected; Refused where its name has a file, ConfigError where it is a cycle."""
        files = self._configured()
        if any(producer.name == name for producer in files):
            raise Refused(f"There is a producer {name} already: it has a file", where=name, remedy="Choose another.")
        named = {file.name: file for file in files}
        naming: dict[str, list[Producer]] = {}
        for file in files:
            for other in {*file.after, *file.before}:
                naming.setdefault(other, []).append(file)
        check_newcomer(
            Lost(name, **vars(terms)),
            lambda one: named.get(one) or self.peers.find(one),
            lambda one: [*naming.get(one, ()), *self.peers.naming(one)],
        )
        return self.peers.register(name, owner, process, terms, most)

    def barrier(self, run: str, changed: Callable[[Member], None]) -> Barrier:
        """A barrier for everyone, with nothing told yet."""
        return Barrier.of(self.everyone(), run, changed)

    def resumed(
        self,
        run: str,
        changed: Callable[[Member], None],
        holders: Sequence[Holder],
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
        known = {(producer.name, producer.kind): producer for producer in [*files, *self.peers.known()]}
        if nobody_knows:
            holders = [producer.holder() for producer in (*files, *self.peers.taking_part())]
        lost = nobody_knows and not run  # as opposed to a record in which nobody stands
        told = {
            holder.name: Told(verb.value if verb else holder.told, NOT_RECORDED if lost else holder.note)
            for holder in holders
        }
        producers: list[Producer] = []
        for holder in holders:
            found = known.get((holder.name, holder.kind))
            found = found or by_note(holder)
            if found is None or (restoring and holder.restores and not found.restores):
                found = Lost(holder.name, kind=holder.kind, had_to_restore=bool(holder.restores), unreadable=unreadable)
            producers.append(found)
        if restoring:  # whoever has nothing to restore may stand between two that have
            named = {holder.name for holder in holders}
            producers += [file for file in files if not file.restores and file.name not in named]
        barrier = Barrier.of(producers, run, changed, told, any_order=True)
        if not producers and unreadable is not None:
            barrier.broken = unreadable  # then there may be somebody in it
        return barrier


def by_note(holder: Holder) -> Producer | None:
    """Make the producer of a note that says what was done, and to whom: its file need not be there any more."""
    if holder.kind == Unit.kind:
        return Unit.by_note(holder.name, holder.note)
    return Qemu.by_note(holder.name, holder.note) if holder.kind == Qemu.kind else None
