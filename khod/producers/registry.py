# SPDX-License-Identifier: LGPL-2.1-or-later
"""All producers that take part: those with a file, and those that connect."""

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from khod import model
from khod.deferred import defer_module
from khod.errors import ConfigError, Refused, UsageError
from khod.handover.record import Owner, Process, ProducerRecord
from khod.producers.barrier import NOT_RECORDED, Barrier, Member, Participant, PriorCall, Verb, read_verb
from khod.producers.cgroup import find_units_listening
from khod.producers.lost import MissingProducer
from khod.producers.order import check_newcomer, order_in_ranks
from khod.producers.peer import KIND, Peer, Registration
from khod.producers.peers import Peers

if TYPE_CHECKING:
    from khod.producers import kept, qemu, unit
    from khod.systemd import dbus
else:
    kept = defer_module("khod.producers.kept")
    qemu = defer_module("khod.producers.qemu")
    unit = defer_module("khod.producers.unit")
    dbus = defer_module("khod.systemd.dbus")

LOG = logging.getLogger(__name__)


class ProducerRegistry:
    """The producers of this host. `configured` reads the files each time; ConfigError if one is wrong."""

    def __init__(self, configured: Callable[[], list[Participant]], peers: Peers) -> None:
        self.peers = peers
        self._configured = configured

    def all_producers(self) -> list[Participant]:
        """Return every producer that is configured, connected or waited for, except those with something to claim.

        ConfigError if a file is wrong, or if a producer is registered under a name that has a file: a handover without
        either of the two would lose its state.
        """
        files = self._read_files(self._peer_names())
        for peer in self._shadowed_peers(files):
            where = peer.owner.unit or (f"process {peer.bearer_process.pid}" if peer.bearer_process else "no process")
            raise ConfigError(
                f"Two producers are called {peer.name}: one has a file, the other is registered ({where})",
                where=f"producer {peer.name}",
                remedy=f"Stop {where}, or rename the file in /etc/kho/producers.d.",
            )
        return [*files, *self.peers.taking_part()]

    def needed_units(self) -> dict[str, str]:
        """Return the units of systemd that the producers need until the jump, with the reason; ConfigError as above.

        A virtual machine needs the unit of its QEMU, whoever started that.
        """
        needed: dict[str, str] = {}
        for producer in (*self._configured(), *self.peers.taking_part()):
            units = [*producer.units]
            if producer.kind in ("qemu", "vm") and isinstance(producer, qemu.Qemu | kept.KeptVm):
                units += find_units_listening(producer.socket)
            needed |= dict.fromkeys(units, f"producer {producer.name} needs it")
        return needed

    def _read_files(self, served: Collection[str]) -> list[Participant]:
        """Return the producers with a file, except the kept VMs of these names: a peer is the producer of such a VM."""
        return [file for file in self._configured() if not (_is_kept_vm(file) and file.name in served)]

    async def start_supervisors(self) -> list[str]:
        """Have systemd start khod-vm for each kept VM whose khod-vm is not connected; return the VMs' names.

        A file that is wrong, and a unit that systemd does not start, are reported where the VM is missed.
        """
        started = []
        with suppress(ConfigError):
            for vm in self._configured():
                peer = self.peers.find_peer(vm.name)
                if _is_kept_vm(vm) and vm.runner.has_units and not (peer and peer.is_reachable):
                    try:
                        await vm.start_unit()
                    except (dbus.BusError, TimeoutError) as error:
                        LOG.warning("%s cannot be started: %s", vm.unit, error or "systemd does not answer")
                    else:
                        started.append(vm.name)
        return started

    def _peer_names(self) -> set[str]:
        return {peer.name for peer in self.peers.all_peers()}

    def _shadowed_peers(self, files: Sequence[Participant]) -> list[Peer]:
        """Return the peers that are registered under a name that has a file."""
        named = {file.name for file in files}
        return [peer for peer in self.peers.all_peers() if peer.name in named]

    def find_producer(self, name: str) -> Participant:
        """Return a producer by its name; UsageError if there is none."""
        found = next((producer for producer in self.all_producers() if producer.name == name), None)
        if found is None:
            raise UsageError(f"There is no producer {name!r}", where=name, remedy="khoctl producers lists them.")
        return found

    def status_rows(self, told: Sequence[Member]) -> list[model.Producer]:
        """Return every producer as status shows it, in rank order; `told` are those of the last attempt."""
        known = {_record_key(member.producer): member for member in told}
        files, shown = self._read_files(self._peer_names()), []
        shadowed = self._shadowed_peers(files)
        peers = [peer for peer in self.peers.all_peers() if peer not in shadowed]
        for rank, producers in enumerate(order_in_ranks([*files, *peers])):
            members = [known.get(_record_key(producer)) or Member(producer) for producer in producers]
            shown += [replace(_show_member(member), rank=rank) for member in members]
        return shown + [replace(Member(peer).to_model(), answer="there is a file of this name") for peer in shadowed]

    def register_peer(self, name: str, owner: Owner, process: Process, terms: Registration, most: int) -> Peer:
        """Register a producer that has connected; Refused if its name has a file, ConfigError if it closes a cycle.

        The file of a kept VM is for the producer of its name, which root runs.
        """
        files = self._read_files({name} if owner.uid == 0 else ())
        if any(producer.name == name for producer in files):
            raise Refused(f"There is a producer {name} already: it has a file", where=name, remedy="Choose another.")
        named = {file.name: file for file in files}
        naming: dict[str, list[Participant]] = {}
        for file in files:
            for other in {*file.after, *file.before}:
                naming.setdefault(other, []).append(file)
        check_newcomer(
            MissingProducer(name, after=terms.after, before=terms.before),
            lambda one: named.get(one) or self.peers.find_peer(one),
            lambda one: [*naming.get(one, ()), *self.peers.peers_naming(one)],
        )
        return self.peers.register_peer(name, owner, process, terms, most)

    def make_barrier(self, run: str, changed: Callable[[Member], None]) -> Barrier:
        """Return a barrier of all producers, with nothing told yet."""
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
        """Return the barrier of an attempt that was begun before, with the producers of its record.

        Any of them may have been told `verb`; None if the record has the verb of each, or if nobody was told anything.
        With `verb` and without holders no record says who was told, so every producer is included.

        A MissingProducer takes the place of one that is gone, or whose file cannot be read, so that all others are
        told. With `restoring` it also takes the place of one that can no longer restore anything, and producers with
        files that restore nothing are included for the order of the others.
        """
        unreadable: ConfigError | None = None
        try:
            files = self._configured()
        except ConfigError as error:
            files, unreadable = list(error.readable), error
        except Exception as error:
            LOG.exception("the producers' files cannot be read")
            files, unreadable = [], ConfigError(f"The producers' files cannot be read: {error!r}", where="producers.d")
        nobody_knows = not holders and verb is not None  # no record says who was told: it may be any of them
        if nobody_knows:
            self.peers.expect_absent(run)
        known = {_record_key(producer): producer for producer in [*files, *self.peers.all_peers()]}
        if nobody_knows:
            holders = [producer.to_record() for producer in (*files, *self.peers.taking_part())]
        lost = nobody_knows and not run  # as opposed to a record without producers
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
        if restoring:  # one with nothing to restore may be between two that restore
            named = {holder.name for holder in holders}
            producers += [file for file in files if not file.restores_state and file.name not in named]
        barrier = Barrier.from_producers(producers, run, changed, told, any_order=True)
        if not producers and unreadable is not None:
            barrier.broken = unreadable  # a file that cannot be read may have a producer
        return barrier


def _record_key(producer: Participant) -> tuple[str, str]:
    """Return what tells one producer from another in the record, where a peer is one whatever it shows itself as."""
    return producer.name, KIND if isinstance(producer, Peer) else producer.kind


def _show_member(member: Member) -> model.Producer:
    """Return a member as status shows it; of a VM without its supervisor, which one is missing."""
    shown = member.to_model()
    producer = member.producer
    if _is_kept_vm(producer) and member.told is None:
        return replace(shown, answer=f"{producer.unit} is not there")
    return shown


def _is_kept_vm(producer: Participant) -> "TypeGuard[kept.KeptVm]":
    """Tell whether it is a kept VM; where no producer is shown as one, nothing is imported for that."""
    return producer.kind == "vm" and isinstance(producer, kept.KeptVm)


def by_note(holder: ProducerRecord) -> Participant | None:
    """Return the producer of a note that says what was done, and to what: its file may be gone by now."""
    if holder.kind == unit.Unit.kind:
        return unit.Unit.by_note(holder.name, holder.note)
    return qemu.Qemu.by_note(holder.name, holder.note) if holder.kind == qemu.Qemu.kind else None
