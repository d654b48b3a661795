"""Everyone who takes part: the producers with a file, and those that connect."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from khod import model
from khod.errors import ConfigError, Refused, UsageError
from khod.producers.barrier import Barrier, Member, Producer, Told, Verb, ranks
from khod.producers.lost import Lost
from khod.producers.peers import Peer, Peers, Terms
from khod.record import Holder, Owner, Process


class Muster:
    """The producers of this host. `configured` reads the files anew each time; ConfigError where one is wrong."""

    def __init__(self, configured: Callable[[], list[Producer]], peers: Peers) -> None:
        self.peers = peers
        self._configured = configured

    def everyone(self) -> list[Producer]:
        """Every producer that is configured, connected or waited for; ConfigError."""
        return [*self._configured(), *self.peers.known()]

    def find(self, name: str) -> Producer:
        """Give a producer by its name; UsageError where there is none."""
        found = next((producer for producer in self.everyone() if producer.name == name), None)
        if found is None:
            raise UsageError(f"There is no producer {name!r}", where=name, remedy="khoctl producers lists them.")
        return found

    def shown(self, told: Sequence[Member]) -> list[model.Producer]:
        """What status says of everyone, in rank order; `told` are those of the last attempt."""
        known = {member.producer.name: member for member in told}
        shown = []
        for rank, producers in enumerate(ranks(self.everyone())):
            members = [known.get(producer.name) or Member(producer) for producer in producers]
            shown += [replace(member.shown(), rank=rank) for member in members]
        return shown

    def register(self, name: str, owner: Owner, process: Process, terms: Terms, most: int) -> Peer:
        """Take in a producer that has connected; Refused where its name has a file, ConfigError where it is a cycle."""
        files = self._configured()
        if any(producer.name == name for producer in files):
            raise Refused(f"There is a producer {name} already: it has a file", where=name, remedy="Choose another.")
        named = self.peers.names(name) or any(name in (*file.after, *file.before) for file in files)
        if named or terms.after or terms.before:
            ranks([*(producer for producer in self.everyone() if producer.name != name), Lost(name, **vars(terms))])
        return self.peers.register(name, owner, process, terms, most)

    def barrier(self, run: str, changed: Callable[[Member], None]) -> Barrier:
        """A barrier for everyone, with nothing told yet."""
        return Barrier.of(self.everyone(), run, changed)

    def resumed(
        self, run: str, changed: Callable[[Member], None], holders: Sequence[Holder], verb: Verb | None
    ) -> Barrier:
        """The barrier of an attempt that was begun before, with the producers of its record alone.

        Any of them may have been told `verb`; None after a rollback, for then the record has it of each. One
        that is gone is said to be. Where the files cannot be read the barrier is broken: nobody can be told.
        """
        try:
            known = {producer.name: producer for producer in self.everyone()}
            if not holders:  # a record of before it named them: then it may be anyone
                holders = [producer.holder() for producer in known.values()]
            told = {holder.name: Told(verb.value if verb else holder.told, holder.note) for holder in holders}
            producers = [known.get(holder.name) or Lost(holder.name, kind=holder.kind) for holder in holders]
            return Barrier.of(producers, run, changed, told)
        except ConfigError as error:
            return Barrier(run, changed, error)
