# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod does first: compare its record with the kernel, and find out which producers may return."""

import asyncio
from contextlib import suppress

from khod.engine.observer import Observer
from khod.engine.resources import Resources
from khod.engine.transaction import Transaction
from khod.errors import KhoError, RecordError
from khod.handover import reconcile
from khod.handover.machine import RESTING
from khod.handover.reconcile import Action, Found
from khod.handover.record import Record
from khod.model import Observed, Step
from khod.producers.peers import Peers

ASK_AGAIN_SECONDS = 5.0
"""Seconds between a question that the kernel did not answer and the next one."""


class Startup:
    """Finds out the state of the host; every question to the kernel or to a file system has a deadline."""

    def __init__(
        self,
        transaction: Transaction,
        observer: Observer,
        peers: Peers,
        resources: Resources,
    ) -> None:
        self._transaction = transaction
        self._observer = observer
        self._peers = peers
        self._store = resources.store
        self._kexec = resources.kexec
        self._workers = resources.workers
        self._settings = resources.settings

    async def find_out(self) -> tuple[Found, Observed, str]:
        """Set the transaction to the state of the host.

        Returns what was found, the kernel's state, and a note for the operator.
        """
        record = await self._read_record()
        self._transaction.adopt_found(
            reconcile.provisional_state(record), record if isinstance(record, Record) else Record()
        )
        observed = await self._observe_kernel(record)
        found = reconcile.reconcile_record(record, observed, self._settings.current.policy.after_daemon_died)
        note = ""
        if (departed := await self._read_departure(record, observed)) is not None:
            note = f"The copy that left with the jump stands in for the record: {found.reason}"
            record, found = departed, reconcile.reconcile_record(departed, observed)
        current = record if isinstance(record, Record) else Record()
        if found.phase in RESTING and found.action is Action.none:
            current = reconcile.reset_record(current, found, observed)
        self._transaction.adopt_found(found, current)
        self._peers.expect_registered(observed.boot_id)
        self._expect_producers(found, current, observed)
        if isinstance(record, RecordError):
            # If they were told that nothing waits for them, they would thaw, and the host may be about to jump.
            self._peers.expect_absent(current.run)
        return found, observed, note

    async def _read_record(self) -> Record | RecordError | None:
        try:
            deadline = self._settings.current.deadlines.activate
            return await self._workers.disk.call_within(self._store.read, "reading the record", deadline)
        except RecordError as error:
            return error
        except Exception as error:  # noqa: BLE001 - after any error the record counts as unreadable
            return RecordError(f"The record cannot be read: {error}", where=str(self._store.record_path))

    async def _observe_kernel(self, record: Record | RecordError | None) -> Observed:
        """Return the kernel's state or, if the kernel does not answer, the state in the record: then an undo may begin.

        Without such a record, the kernel is asked until it answers.
        """
        while (observed := await self._observer.try_observe(self._settings.current.deadlines.activate)) is None:
            if isinstance(record, Record) and record.done and await self._boot_id() in ("", record.boot_id):
                self._transaction.emit_event("the kernel does not say how it stands: the record is taken for it")
                loaded = Step.load in record.done
                return Observed(record.boot_id, record.release, active=None, loaded=loaded, arrived=False, cmdline="")
            # Whether state arrived must not be guessed: a boot that is taken for a cold boot gives up what arrived.
            self._transaction.emit_event("the kernel does not say how it stands: it is asked again")
            await asyncio.sleep(ASK_AGAIN_SECONDS)  # the question may have failed at once
        return observed

    async def _boot_id(self) -> str:
        """Return this boot's id, "" if it cannot be read."""
        with suppress(KhoError, OSError):
            deadline = self._settings.current.deadlines.observe
            return await self._workers.files.call_within(self._kexec.boot_id, "reading the boot id", deadline)
        return ""

    async def _read_departure(self, record: Record | RecordError | None, observed: Observed) -> Record | None:
        """Return the copy of the record that left with the jump into this boot, if the record is unreadable or gone."""
        if isinstance(record, Record):
            return None
        deadline = self._settings.current.deadlines.activate
        with suppress(KhoError):
            departed = await self._workers.disk.call_within(self._store.read_departure, "reading the record", deadline)
            if departed is None or departed.boot_id == observed.boot_id:
                return None
            if reconcile.reconcile_record(departed, observed).action is not Action.verify:
                return None
            with suppress(KhoError):
                await self._workers.disk.call_within(self._store.set_aside, "keeping the record", deadline)
            return departed
        return None

    def _expect_producers(self, found: Found, record: Record, observed: Observed) -> None:
        """Tell the peers who may return: the producers of the handover under way, and those with something to claim.

        At the first start after a jump, the recorded claims are those of the boot before, and were lost in it.
        """
        if found.action is Action.verify and (record.boot_id != observed.boot_id or not record.claims):
            self._peers.expect_holders(record.producers, record.run, restoring=True)
            return
        self._peers.expect_holders(record.claims, record.arrived_run, restoring=True)
        self._peers.expect_holders(record.producers, record.run, restoring=False)
