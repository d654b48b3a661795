# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold after every rule, by name; each speaks of what is true of the host, not of what khod believes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from khod.concurrency.bounded import CUT_SECONDS
from khod.engine.rollback import KERNEL, OVERHEAD_SECONDS
from khod.errors import Exit, KhoError, RecordError
from khod.handover.machine import HELD, RESTING
from khod.handover.record import Record, decode_record
from khod.handover.session_names import session_of
from khod.model import Event, Phase, Status, Step
from khod.producers.barrier import UNDO
from tests.model.kernel import Image
from tests.model.producers import Service
from tests.model.systemd import Job

if TYPE_CHECKING:
    from tests.model.ground import Ground
    from tests.model.host import Khod, Operation

INVARIANTS = {
    "frozen_at_rest": "nobody is frozen while khod is at rest, unless reported as not undone",
    "loaded_at_rest": "nothing is loaded or active at rest, unless it is foreign and khod says so",
    "session_freed": "no session from the previous kernel is closed but by finish or forget",
    "claims_recorded": "what waits for its producer stands in the record",
    "verified": "verified only where everything that left arrived and was taken back",
    "abort_bound": "every abort ends within its bound",
    "record_readable": "the record on disk can be read by the next khod",
    "record_complete": "the record on disk describes no less than what was done",
    "left_complete": "what is not undone is named while a handover has failed",
    "jump_frozen": "the host jumps only while everyone who takes part is frozen",
    "event_lost": "what ends a handover is acted on before it goes on",
    "called_back": "what was said to be put back does not go down with the host all the same",
    "kept_for_jump": "what is loaded when systemd jumps is not taken away under it",
    "executing_ends": "a jump that does not come is noticed",
    "outcome_kept": "a boot that went wrong is not hidden by what happens after it",
    "start_comes_up": "khod starts, whatever it finds",
    "printable": "whatever others say is one line of printable text",
    "bounded": "descriptors of others do not pile up",
    "rolled_back": "what ends with an error, and not with `not rolled back`, has put everything back",
    "clean_boot": "a host that booted cold is at rest, whatever was under way before",
    "forgettable": "whatever waits for its producer can be given up",
    "recovers": "once all is mended, an abort puts everything back",
}


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {INVARIANTS[name]}. {what}")
        self.name = name


@dataclass(frozen=True)
class OnDisk:
    """The record as the next khod would find it; `error` where it could not read it."""

    record: Record
    error: str = ""


def abort_bound(world: "Ground") -> float:
    """Seconds in which an abort must be over: what `khoctl plan` prints, with each producer in a rank of its own."""
    timeouts = [peer.timeout for peer in world.peers()] + [file.timeout for file in world.files.values()]
    slowest = sum(timeout + CUT_SECONDS for timeout in timeouts)
    return float(len(KERNEL) * world.config.deadlines.rollback + len(UNDO) * slowest + OVERHEAD_SECONDS)


class Invariants:
    """Watches one host. `known` are names of invariants that are not held: what is known not to hold yet."""

    def __init__(self, world: "Ground", known: frozenset[str]) -> None:
        self._world, self._known = world, known
        self.violation: Violation | None = None
        self.damaged = False
        """Whether somebody else's hand was in the record: then it need not tell the truth."""
        self.removed = False
        """Whether the record was removed: who is frozen then, nobody can know, until everyone is told by force."""
        self.must_end: dict[str, str] = {}
        """What is to end a handover, by its run."""
        self.bad_outcome: Phase | None = None
        """What this boot came to, where that is nothing good."""
        self.khod_was_up = True
        """Whether khod ran as the shutdown began that ends in this jump."""
        self._raw: bytes | None = None
        self._changes = -1
        self._executing_since = world.clock.now
        self._on_disk = OnDisk(Record())

    # What the host notes as it happens

    def violated(self, name: str, what: str) -> None:
        """Note it; raised by `hold`, as khod's own code would catch it here."""
        if name not in self._known and self.violation is None:
            self.violation = Violation(name, what)

    def heard(self, event: Event) -> None:
        answer = event.producer.answer if event.producer else ""
        if not event.message.isprintable() or not answer.isprintable():
            self.violated("printable", f"khod said {event.message!r}")

    def finished(self, session: str) -> None:
        for left in self._world.left.values():
            if left.session != session or left.taken_back:
                continue
            khod = self._world.khod
            forgets = khod is not None and any(
                operation.kind == "forget" and operation.about == left.name for operation in khod.operations
            )
            left.forgotten = left.forgotten or forgets
            if not left.forgotten:
                self.violated("session_freed", f"{session} of {left.name} was finished, and it had not taken it back")

    def jumps(self, by: str, image: Image) -> None:
        """The kernel that runs is about to jump."""
        world = self._world
        run = next((word[9:] for word in image.cmdline.split() if word.startswith("khod.run=")), "")
        if by == "foreign" or not run or self.removed:
            return  # without a record no khod knows who is frozen
        record = self.on_disk().record
        if record.phase is Phase.failed and Step.load in record.done:
            return  # it could not be unloaded, and khod has said so: do not reboot
        if (why := self.must_end.get(run)) is not None:
            self.violated("event_lost", f"{why} in run {run}, and the host jumped all the same (by {by})")
        waiting = {holder.name for holder in record.claims}  # they take no part, where the check lets it pass
        for service in self._members():
            if service.name in waiting or service.restarted:
                continue
            took_part = by == "khod" or run in (service.run, service.frozen_run)
            if took_part and not service.frozen and self.khod_was_up:
                self.violated(
                    "jump_frozen", f"{service.name} is not frozen ({service.truth}) as the host jumps (by {by})"
                )
        if by == "job" and (job := world.systemd.job) is not None and job.called_back:
            self.violated("called_back", "khod had said that everything was put back")

    def forget_events(self) -> None:
        """Another khod is started, which may resume: what the one before had read and not acted on went with it.

        A producer that is gone is missed before the next step: see jump_frozen.
        """
        self.must_end.clear()

    def went_cold(self, job: Job) -> None:
        """A shutdown that was to end in a kexec found nothing to jump into."""
        if job.kexec and job.by == "khod" and job.called_back:
            self.violated("called_back", "khod put everything back under its own shutdown, and the host booted cold")

    def stops_for(self, job: Job) -> bool:
        """Whether khod, told to stop, must leave what is loaded for systemd to jump into."""
        world, khod = self._world, self._world.khod
        ours = world.kernel.image is not None and world.kernel.image.by == "khod"
        asked = job.kexec and world.systemd.answers and ours and khod is not None and khod.started and not khod.busy
        well = not world.faults.armed and world.faults.kill is None and not self.must_end and not world.disk.trouble
        calm = not any(service.behaviours for service in world.everyone()) and not world.broken
        return bool(asked and well and calm and khod is not None and khod.phase in HELD | {Phase.executing})

    def stopped_for(self, job: Job) -> None:
        """khod has stopped, and was to leave what was loaded."""
        if not self._world.kernel.loaded:
            self.violated("kept_for_jump", f"khod unloaded it under a kexec of {job.by}'s")

    def power_lost(self) -> None:
        """The disk has what was synced."""

    def booted(self) -> None:
        """Another kernel runs."""
        self.must_end.clear()
        self.removed = False
        self.bad_outcome = None
        self.khod_was_up = True

    def ended(self, operation: "Operation") -> None:
        """Something that was asked of khod is over."""
        world = self._world
        if (
            operation.kind == "start"
            and isinstance(operation.error, Exception)
            and operation.faults == world.faults.fired
        ):
            self.violated("start_comes_up", f"it ended with {operation.error!r}")
        says_back = (
            operation.error is None if operation.kind == "abort" else operation.kind == "kexec" and operation.error
        )
        job, khod = world.systemd.job, world.khod
        if job is not None and operation.about == "force" and not world.systemd.answers:
            job.forced = True
        knows = khod is not None and khod.phase in RESTING and not self.damaged and not self.removed
        if says_back and knows and job is not None and not job.forced:
            job.called_back = True
        self._put_back(operation)
        if operation.kind == "abort" and operation.about == "force" and operation.error is None:
            if self.removed or self.damaged:
                for service in self._world.everyone():
                    service.is_unknown = service.lost_its_file
            self.removed = False
        if operation.kind in ("activate", "kexec", "load", "abort"):
            text = str(operation.error or "")
            if isinstance(operation.error, KhoError) and not text.isprintable():
                self.violated("printable", f"{operation.kind} ended in {text!r}")
            if "held at" in text:
                self.must_end.clear()

    def _put_back(self, operation: "Operation") -> None:
        """An activate or kexec that failed left nothing behind, or says that it did."""
        khod, error = self._world.khod, operation.error
        if operation.kind not in ("activate", "kexec", "load") or khod is None or khod.busy or error is None:
            return
        says_so = isinstance(error, KhoError) and error.exit is Exit.not_rolled_back
        if operation.alone and not says_so and khod.phase in HELD and khod.phase is not operation.phase:
            self.violated("rolled_back", f"{operation.kind} ended with {error!r}; khod says {khod.phase.value}")

    # After every rule

    def hold(self) -> None:
        """Raise the first violation there is."""
        khod = self._world.khod
        if khod is not None:
            for operation in khod.operations:
                if operation.over and not operation.noted:
                    operation.noted = True
                    self.ended(operation)
        for check in (
            self._abort_bound,
            self._record,
            self._sessions,
            self._claims,
            self._verified,
            self._event_lost,
            self._clean_boot,
            self._executing_ends,
            self._bounded,
        ):
            if self.violation is None:
                check()
        if self.violation is None and khod is not None and khod.process.alive and khod.started:
            self._at_rest(khod)
        if self.violation is not None:
            raise self.violation

    def _members(self) -> list[Service]:
        """Everyone who takes part: those with a file, and those that are connected."""
        world = self._world
        found: list[Service] = []
        found += [file.service for file in world.files.values() if file.service.alive]
        found += [peer for peer in world.peers() if peer.registered]
        return [service for service in found if not service.is_unknown]

    def _held(self) -> list[Service]:
        """Everyone khod has frozen, and could thaw."""
        return [service for service in self._members() if service.frozen]

    def on_disk(self) -> OnDisk:
        """The record, read as the next khod would."""
        if self._world.disk.changes == self._changes:
            return self._on_disk
        self._changes = self._world.disk.changes
        raw = self._world.record_on_disk()
        if raw != self._raw:
            self._raw = raw
            try:
                self._on_disk = OnDisk(Record() if raw is None else decode_record(raw))
            except RecordError as error:
                self._on_disk = OnDisk(Record(), error.what)
        return self._on_disk

    def _abort_bound(self) -> None:
        khod = self._world.khod
        for operation in khod.operations if khod is not None and khod.process.alive else ():
            if operation.kind == "abort" and operation.bound is not None:
                until = operation.ended if operation.ended is not None else self._world.clock.now
                if until > operation.bound + 1.0 or (operation.ended is None and until >= operation.bound):
                    took = until - operation.began
                    self.violated(
                        "abort_bound", f"abort took {took:g} s, its bound is {operation.bound - operation.began:g} s"
                    )

    def _record(self) -> None:
        found = self.on_disk()
        if self.damaged or self.removed:
            return
        if found.error:
            self.violated("record_readable", found.error)
            return
        record, kernel = found.record, self._world.kernel
        missing = []
        resting = record.phase in RESTING
        for service in self._members():
            if not (service.frozen or service.prepared) or not service.run:
                continue
            known = {holder.name for holder in record.producers}
            step = Step.freeze if service.frozen else Step.prepare
            if resting or record.run != service.run or service.name not in known or step not in record.done:
                missing.append(f"{service.name} ({service.truth})")
        if kernel.active_by == "khod" and (resting or Step.activate not in record.done):
            missing.append("the kernel's active phase")
        if kernel.image is not None and kernel.image.by == "khod" and (resting or Step.load not in record.done):
            missing.append("the loaded image")
        if missing:
            steps = ", ".join(step.value for step in record.done)
            self.violated("record_complete", f"{', '.join(missing)}: not in the record ({record.phase.value}; {steps})")

    def _sessions(self) -> None:
        world = self._world
        for session, cause in world.kernel.luo.freed:
            owner = next((left for left in world.left.values() if left.session == session), None)
            between = world.faults.killed_at in BETWEEN_TWO_OWNERS and cause == "death of khod"
            if owner is not None and not owner.forgotten and not owner.taken_back and not between:
                self.violated("session_freed", f"{session} of {owner.name} was let go: {cause}")
        world.kernel.luo.freed.clear()

    def _claims(self) -> None:
        khod = self._world.khod
        if khod is None or not khod.started or self.damaged or khod.busy:
            return
        record = self.on_disk().record
        known = {session_of(record.run, holder.name) for holder in record.producers}
        known |= {session_of(record.arrived_run, holder.name) for holder in record.claims}
        known |= set(khod.engine.queries.unknown_sessions)  # they are listed, and kept
        for session in self._world.kernel.luo.unclaimed - known:
            owner = next((left for left in self._world.left.values() if left.session == session), None)
            if owner is not None and not owner.taken_back and not owner.forgotten:
                self.violated("claims_recorded", f"{session} of {owner.name} waits, and the record does not say so")

    def _verified(self) -> None:
        world, khod = self._world, self._world.khod
        if khod is None or khod.phase is not Phase.verified or not khod.started:
            return
        record = khod.engine.record
        missing = [
            left.name
            for left in world.left.values()
            if left.restores and left.run == record.arrived_run and not left.taken_back
        ]
        if not world.tree_arrived:
            self.violated("verified", f"run {record.run}, and no tree arrived as it left: booted by {world.boot_by}")
        elif missing:
            self.violated("verified", f"not taken back: {', '.join(missing)}")

    def _event_lost(self) -> None:
        khod = self._world.khod
        if not self.must_end or khod is None or not khod.process.alive:
            return
        run = khod.engine.record.run
        if khod.phase not in HELD or khod.busy:
            if khod.phase not in HELD and not khod.busy:
                self.must_end.pop(run, None)
            return
        if run in self.must_end and not khod.loop.ready:
            self.violated("event_lost", f"{self.must_end[run]}, and the handover still stands at {khod.phase.value}")

    def _executing_ends(self) -> None:
        world, khod = self._world, self._world.khod
        if khod is None or khod.phase is not Phase.executing or world.systemd.job is not None or khod.calls_hang:
            self._executing_since = world.clock.now
        elif world.clock.now - self._executing_since > 2 * abort_bound(world):
            self.violated(
                "executing_ends", f"nothing takes the host down for {world.clock.now - self._executing_since:g} s"
            )

    def _clean_boot(self) -> None:
        world, khod = self._world, self._world.khod
        if khod is None or not khod.started or khod.busy or self.damaged or world.boot_by not in ("power", "cold"):
            return
        if khod.reason.startswith("The record cannot be read"):
            return  # nobody can tell which boot it is of
        another = self.on_disk().record.boot_id != world.kernel.boot_id
        if another and khod.phase is Phase.inconsistent and not world.kernel.active and not world.kernel.loaded:
            self.violated(
                "clean_boot", f"khod says {khod.phase.value}: {khod.last_event.message if khod.last_event else ''}"
            )

    def _bounded(self) -> None:
        khod = self._world.khod
        if khod is None or khod.busy or khod.loop.ready or khod.phase not in RESTING or khod.calls_hang:
            return
        if len(khod.process.fds) > len(self._world.systemd.kept) + SPARE_DESCRIPTORS:
            self.violated("bounded", f"khod has {len(khod.process.fds)} descriptors open at rest")

    def _at_rest(self, khod: "Khod") -> None:
        """Ask khod how it stands, where it had better say the right thing."""
        world = self._world
        kernel = world.kernel
        if khod.phase in (Phase.degraded, Phase.cold_boot) and self.bad_outcome is None and not khod.busy:
            self.bad_outcome = khod.phase
        if khod.busy:
            return
        odd = self._held() or kernel.active or kernel.loaded or self.bad_outcome is not None
        if not odd:
            forgotten = khod.phase in RESTING and not self.on_disk().error and not kernel.luo.unclaimed
            self.damaged = self.damaged and not forgotten
            return
        if (status := world.ask_status()) is None:
            return
        self._frozen(khod, status)
        self._loaded(khod, status)
        self._outcome(khod, status)

    def _frozen(self, khod: "Khod", status: Status) -> None:
        held = [f"{service.name} ({service.truth})" for service in self._held()]
        if not held or self.removed:
            return
        if khod.at_rest(status) and not khod.says_foreign(status):
            self.violated("frozen_at_rest", f"khod says {status.phase.value}; frozen: {', '.join(held)}")
        if status.phase is Phase.failed and "freeze" not in khod.not_undone(status):
            self.violated("left_complete", f"not undone: {status.left}; frozen: {', '.join(held)}")

    def _loaded(self, khod: "Khod", status: Status) -> None:
        kernel = self._world.kernel
        image = kernel.image
        if status.phase is Phase.failed:
            for step, by in (("activate", kernel.active_by), ("load", image.by if image else "")):
                if by == "khod" and step not in khod.not_undone(status):
                    self.violated("left_complete", f"not undone: {status.left}; {step} of khod's is still in effect")
        if not khod.at_rest(status):
            return
        ours = [
            what for what, by in (("active", kernel.active_by), ("loaded", image.by if image else "")) if by == "khod"
        ]
        if ours and not self.damaged:
            self.violated("loaded_at_rest", f"khod says {status.phase.value}; by khod: {', '.join(ours)}")
        elif (kernel.active or kernel.loaded) and not khod.says_foreign(status):
            self.violated("loaded_at_rest", f"khod says {status.phase.value}; by somebody else: {kernel.image}")

    def _outcome(self, khod: "Khod", status: Status) -> None:
        wanted = self.bad_outcome
        if wanted is None or status.stale or self.damaged:
            return
        if khod.engine.record.run != self._world.boot_run and status.phase not in (Phase.idle, Phase.foreign):
            self.bad_outcome = None  # another handover has begun in this boot
            return
        if khod.outcome(status) is not wanted and khod.outcome(status) is not Phase.verified:
            self.violated("outcome_kept", f"this boot is {wanted.value}, khod says {status.phase.value}")

    # At the end

    def claims(self) -> list[str]:
        """The producers whose state waits for them, by the record of a host at rest."""
        record = self.on_disk().record
        of_this_boot = record.boot_id == self._world.kernel.boot_id
        return [holder.name for holder in record.claims] if of_this_boot and record.phase in RESTING else []

    def recovered(self) -> None:
        """Everything is mended and an abort was made: nothing is held any more."""
        self.hold()
        if claims := self.claims():
            self.violated("forgettable", f"{', '.join(claims)} cannot be forgotten")
        world, khod = self._world, self._world.khod
        if khod is None:
            self.violated("recovers", "khod does not come up")
        else:
            held = [f"{service.name} ({service.truth})" for service in self._held()]
            status = world.ask_status()
            if status is None:
                self.violated("recovers", "khod does not answer")
            elif status.phase is Phase.executing and (world.systemd.job is not None or not world.systemd.answers):
                pass  # nothing is undone under a jump that may still happen
            elif self.removed:
                pass  # there is no record of what was done
            elif status.phase is Phase.failed and "is gone or says nothing" in status.last_error:
                pass  # nobody can be told any more, and that is said
            elif held or world.kernel.active or world.kernel.loaded:
                what = [
                    *held,
                    *(["active"] if world.kernel.active else []),
                    *(["loaded"] if world.kernel.loaded else []),
                ]
                self.violated(
                    "recovers", f"khod says {status.phase.value} ({status.last_error}); held: {', '.join(what)}"
                )
            elif status.phase not in RESTING:
                self.violated("recovers", f"khod says {status.phase.value} ({status.last_error})")
        if self.violation is not None:
            raise self.violation


BETWEEN_TWO_OWNERS = (("luo.retrieve", "after"), ("fdstore.put", "before"))
"""Where khod alone has a session, which no kernel call avoids: the points of its death that lose one."""
SPARE_DESCRIPTORS = 2
"""Descriptors a khod at rest may have besides the sessions that the service manager has, too."""
