# SPDX-License-Identifier: LGPL-2.1-or-later
"""The start of khod on a host that may be in the middle of a handover, and its stop."""

from contextlib import suppress

from khod.engine.attempts import Attempts
from khod.engine.background import Background
from khod.engine.cold_boot import ColdBootInquiry
from khod.engine.jump import Jump
from khod.engine.observer import Observer
from khod.engine.recorder import Recorder
from khod.engine.resources import Resources
from khod.engine.restoration import Restoration
from khod.engine.signals import Signals
from khod.engine.startup import Startup
from khod.engine.transaction import Transaction
from khod.engine.way_back import WayBack
from khod.errors import Failed, KhoError
from khod.handover import reconcile
from khod.handover.machine import HELD, RESTING
from khod.handover.record import Record
from khod.handover.session_names import session_of
from khod.model import Observed, Phase, Step
from khod.producers.peers import Peers


class Start:
    """What khod does before the first operation."""

    def __init__(
        self,
        transaction: Transaction,
        observer: Observer,
        peers: Peers,
        attempts: Attempts,
        restoration: Restoration,
        jump: Jump,
        inquiry: ColdBootInquiry,
        background: Background,
        resources: Resources,
        signals: Signals,
        recorder: Recorder,
    ) -> None:
        self._transaction = transaction
        self._startup = Startup(transaction, observer, peers, resources)
        self._observer = observer
        self._attempts = attempts
        self._restoration = restoration
        self._jump = jump
        self._inquiry = inquiry
        self._background = background
        self._resources = resources
        self._recorder = recorder
        self._busy = signals.busy
        self._known = signals.known
        self._started = signals.started

    async def start_engine(self) -> None:
        """Compare the record with the kernel and act on the result; operations wait for that, questions do not.

        Raises the error of a rollback that failed. The host is served all the same.
        """
        try:
            async with self._busy:
                await self._act_on_state()
        finally:
            self._known.set()
            self._started.set()
            self._recorder.note_start()

    async def _remember_left(self, record: Record) -> None:
        """Finish what an earlier khod left of its runs, once producers and operators wait for nothing any more."""
        await self._started.wait()
        await self._recorder.remember_left(record)

    async def _act_on_state(self) -> None:
        found, observed, note = await self._startup.find_out()
        self._known.set()
        lacking = "" if self._observer.probed.kernel else f"no handover is possible: {self._observer.probed.what}"
        adopted = self._adopt_log(found, observed)
        if not adopted:
            self._background.spawn_task(self._remember_left(self._transaction.record))
        self._transaction.emit_event(found.reason or lacking or "khod started")
        try:
            match found.action:
                case reconcile.Action.verify:
                    self._background.spawn_task(self._attempts.watchdog.take_back())
                    await self._restoration.begin_restoration(observed, self._observer.probed.kernel, found.doubt, note)
                case reconcile.Action.roll_back:
                    if not await self._still_jumps(found.phase, observed):
                        await self._attempts.roll_back(Failed(found.reason))
                case reconcile.Action.resume:
                    self._attempts.watch_devices(self._attempts.current_attempt())
                case reconcile.Action.none if found.phase in RESTING:
                    self._background.spawn_task(self._attempts.watchdog.take_back())
                    await self._transaction.try_write_record(departure_served=True)
        finally:
            self._close_stray_sessions(observed)

    def _adopt_log(self, found: reconcile.Found, observed: Observed) -> bool:
        """Go on with the log of an earlier khod's run, if that has not ended; whether there is one."""
        arrived, record = found.action is reconcile.Action.verify, self._transaction.record
        if arrived or found.phase not in RESTING:
            self._recorder.adopt_run(record, observed, arrived=arrived)
        elif self._inquiry.is_due and record.cold_boot is not None and record.arrived_run:
            # This has it explained, also where the khod that was at it has ended.
            self._recorder.conclude_cold_boot(record.arrived_run, record.cold_boot, observed)
        elif self._inquiry.is_due:
            self._background.spawn_task(self._inquiry.explain_boot())
            return False
        else:
            return False
        return True

    async def _still_jumps(self, phase: Phase, observed: Observed) -> bool:
        """Return whether the jump that an earlier khod requested may still come; if so, it is watched."""
        if phase is not Phase.executing or not observed.loaded or self._resources.shutdown is None:
            return False
        if (down := await self._attempts.current_attempt().goes_down()) is False:
            return False
        self._transaction.emit_event(
            "the host is on its way into the next kernel: nothing is undone"
            if down
            else "systemd does not say whether the host is on its way into the next kernel: nothing is undone. "
            "If systemctl list-jobs shows no kexec.target: `Abort(force)`"
        )
        self._background.spawn_task(self._jump.watch_attempt(self._attempts.current_attempt()))
        return True

    def _close_stray_sessions(self, observed: Observed) -> None:
        """Close outgoing sessions that a handover of this boot left behind, of a producer that was never told anything.

        Other sessions are kept. A session from the previous kernel ends by `finish` or `forget`. A session whose owner
        is in no record stays, and is listed.
        """
        record = self._transaction.record
        ours = record.run not in ("", record.arrived_run) and record.boot_id == observed.boot_id
        if not ours or self._transaction.phase is Phase.inconsistent:
            return
        wanted = {session_of(record.run, holder.name) for holder in record.producers}
        if stray := [session for session in self._resources.sessions.of_run(record.run) if session not in wanted]:
            for session in stray:
                self._resources.sessions.close_session(session)
            self._transaction.emit_event(f"closed {len(stray)} LUO sessions that no producer was told of")


class Stop:
    """What khod does before it ends."""

    def __init__(
        self,
        transaction: Transaction,
        peers: Peers,
        attempts: Attempts,
        way_back: WayBack,
        jump: Jump,
        background: Background,
        signals: Signals,
    ) -> None:
        self._transaction = transaction
        self._peers = peers
        self._attempts = attempts
        self._way_back = way_back
        self._jump = jump
        self._background = background
        self._busy = signals.busy

    async def stop_engine(self, *, jumping: bool | None, going_down: bool = False) -> None:
        """Stop: roll back what is held, unless the host is on its way into the kexec (`jumping`).

        Another program may have requested the jump: with an image loaded, systemd 262 makes a kexec even of a plain
        `systemctl reboot`. Then the handover is completed up to the jump; if that fails, the image is unloaded and the
        host boots cold. If systemd does not say (None), the question is whether khod itself requested the jump: a
        rollback during a jump would lose the state for good. With `going_down` the host is shut down in any case: the
        record then says in which phase.
        """
        self._peers.stop_remembering()
        if self._transaction.phase is Phase.verifying:
            self._background.cancel_tasks()  # the next khod tells it again to those that did not finish
            if going_down:
                await self._transaction.note_cut_short()
            return
        if jumping is None:
            jumping = self._transaction.phase is Phase.executing
        if jumping and Step.load in self._transaction.machine.done:
            await self._go_along()
            return
        if self._jump.in_kernel:
            return  # reboot(2) has not returned: nothing may be undone, and it cannot be waited for
        if self._busy.locked() or self._transaction.phase in HELD | {Phase.executing}:
            stopped = Failed("khod was stopped in the middle of a handover", where="abort")
            await self._way_back.end_and_undo(stopped, stopping=True, down=going_down)
        await self._transaction.settle_shutdown_note()
        await self._transaction.settle_record()

    async def _go_along(self) -> None:
        """The host goes into the kexec: bring the handover to where it may jump, or unload the image."""
        under_way = self._transaction.phase
        self._jump.go_along()
        async with self._busy:  # the operation under way ends first: at the jump it has requested, or rolled back
            with suppress(KhoError):
                if self._transaction.phase in HELD:
                    steps = self._attempts.remaining_steps(Step.execute)[:-1]
                    await self._transaction.run_steps(steps, hold=False)
                if self._transaction.phase in HELD:
                    await self._transaction.record_departure()
            if self._transaction.phase in RESTING:  # it was rolled back, and the host boots cold
                await self._transaction.note_interrupted(under_way)
        if self._transaction.phase is Phase.executing:
            await self._attempts.current_attempt().barrier.make_way()
