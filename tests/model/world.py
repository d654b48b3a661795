# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that can be done with the modelled host: each rule is one method, and takes plain values.

`World.do` carries a rule out, notes it, and holds the invariants: a list of rules can be carried out again.
"""

from functools import partial
from typing import Any

from khod.engine.guard import Uevent
from khod.handover.directory import FILE_NAME
from khod.kernel.sysfs import KHO
from tests.model import host
from tests.model.faults import Fault
from tests.model.ground import CONFIGS, LONG, PEERS, STOP_SECONDS, Ground
from tests.model.invariants import abort_bound
from tests.model.kernel import CMDLINE, ImageFile
from tests.model.patches import installed
from tests.model.peer import PeerProcess
from tests.model.process import Process
from tests.model.producers import Behaviour


class World(Ground):
    """One host. Methods whose names begin with `do_` are rules."""

    def do(self, name: str, *arguments: Any) -> None:
        """Carry a rule out, and hold the invariants."""
        self.log.append((name, *arguments))
        with installed(self._replacements):
            getattr(self, f"do_{name}")(*arguments)
            self.invariants.hold()

    # What an operator asks

    def do_activate(self, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.begin("activate", khod.engine.activate), then)

    def do_kexec(self, image: str | None, now: bool, hold: bool, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.kexec(self.image_of(image) if image else None, now=now, load_only=False, hold=hold), then)

    def do_load(self, image: str | None, hold: bool, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.kexec(self.image_of(image) if image else None, now=False, load_only=True, hold=hold), then)

    def do_abort(self, force: bool, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(self._abort(khod, force=force), then)

    def _abort(self, khod: host.Khod, *, force: bool) -> host.Operation:
        operation = khod.begin("abort", lambda: khod.engine.abort(force=force), about="force" if force else "")
        operation.bound = self.clock.now + abort_bound(self)
        return operation

    def do_forget(self, name: str, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.begin("forget", lambda: khod.engine.forget_producer(name), about=name), then)

    def do_rehearse(self, name: str, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.begin("rehearse", lambda: khod.engine.rehearse_producer(name)), then)

    def do_check(self, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.begin("check", khod.engine.queries.check), then)

    def do_status(self, then: Any) -> None:
        if (khod := self.khod) is not None:
            self._asked(khod.begin("status", khod.engine.queries.status), then)

    def do_reload(self, number: int) -> None:
        self.config = CONFIGS[number]
        if self.khod is not None:
            self.khod.reload(self.config)

    def do_run(self, then: Any) -> None:
        self.run(then)

    # What producers do

    def do_behave(self, name: str, verb: str, kind: str, seconds: float, first: bool, stubborn: float) -> None:
        self.services[name].behaviours.setdefault(verb, []).append(Behaviour(kind, seconds, first, stubborn))

    def do_die(self, name: str) -> None:
        self.services[name].die()

    def do_leave(self, name: str) -> None:
        service = self.services[name]
        if isinstance(service, PeerProcess):
            if service.registered and (service.frozen or service.prepared) and not self.is_excused(service):
                self._must_end(f"{name} has left")
            service.hang_up()

    def do_come(self, name: str) -> None:
        """A process is started, or a service comes back."""
        service = self.services[name]
        if isinstance(service, PeerProcess):
            service.restarted = not service.alive and self.systemd.job is not None  # it may go, and need not be told
            service.start()
        else:
            service.restarted = service.restarted or not service.alive
            service.alive = True

    def do_add_file(self, name: str) -> None:
        self._add_file(name)

    def do_remove_file(self, name: str) -> None:
        if (file := self.files.pop(name, None)) is not None:
            file.service.lost_its_file = file.service.frozen or file.service.prepared

    def do_break_files(self, broken: bool) -> None:
        self.broken = broken

    # What the host does

    def do_device(self, action: str, subsystem: str) -> None:
        khod, event = self.khod, Uevent(action, subsystem, "/sys/devices/x")
        if khod is not None and khod.started and khod.guard.event(event):
            self._must_end(f"{subsystem} {action}")

    def do_foreign_load(self, image: str) -> None:
        passing = Process("kexec", next(self._pids))
        fd = passing.open(ImageFile(image, host.IMAGE))
        self.kernel.load(fd, -1, CMDLINE[image].encode() + b"\0", 4)
        passing.end()

    def do_foreign_unload(self) -> None:
        self.kernel.keep(None)
        if self.systemd.job is not None:
            self.systemd.job.forced = True  # whatever becomes of that shutdown is not khod's any more

    def do_foreign_write(self, active: bool) -> None:
        if self.kernel.exists(f"{KHO}/active"):
            self.kernel.write(f"{KHO}/active", b"1\n" if active else b"0\n")

    def do_foreign_jump(self) -> None:
        """kexec -e: nobody is asked."""
        if self.kernel.loaded:
            self.jumped("foreign")

    def do_disk(self, trouble: str) -> None:
        self.disk.trouble = trouble

    def do_fault(self, site: str, when: str, error: str, seconds: float, nth: int) -> None:
        self.faults.armed.append(Fault(site, when, error, seconds, nth))

    def do_next_jump(self, what: str) -> None:
        setattr(self, what, True)

    def do_systemd(self, what: str, value: bool) -> None:
        setattr(self.systemd, what, value)

    def do_damage(self, how: str) -> None:
        """An operator, or a newer khod, has written the record."""
        path = self._directory / FILE_NAME
        if not path.exists():
            return
        raw = self.record_on_disk() or b""
        content = {
            "cut": raw[: len(raw) // 2],
            "newer": raw.replace(b'"version": 1', b'"version": 99'),
            "removed": None,
        }
        self.invariants.damaged = True
        self.invariants.removed = self.invariants.removed or how == "removed"
        self.disk.damage(FILE_NAME, content[how])

    # How it ends

    def do_kill(self, completes: bool) -> None:
        self._kill(completes=completes)

    def do_kill_at(self, site: str, when: str, nth: int) -> None:
        self.faults.kill = Fault(site, when, nth=nth)

    def do_start(self, then: Any) -> None:
        self.invariants.forget_events()
        self.start_khod(then)

    def do_sigterm(self, then: Any) -> None:
        if self.khod is None or not self.khod.started:
            self._kill()
            return
        khod = self.khod
        operation = khod.stop()
        operation.bound = self.clock.now + STOP_SECONDS
        self.world_loop.call_later(STOP_SECONDS, khod.die)
        self.run(then)

    def do_shutdown(self, kexec: bool) -> None:
        """An operator takes the host down, into what is loaded or cold."""
        self.systemd.begin(kexec=kexec and self.kernel.loaded, by="operator")

    def do_shutdown_ends(self) -> None:
        """The shutdown is called off, or goes nowhere."""
        self.systemd.job = None

    def do_shutdown_goes_on(self) -> None:
        """systemd stops everything, and jumps or reboots."""
        job = self.systemd.job
        if job is None:
            return
        self.invariants.khod_was_up = self.khod is not None and self.khod.started
        keeps = self.invariants.stops_for(job)
        if self.khod is not None:
            self.do_sigterm("end")
        if self.systemd.job is not job:
            return
        if keeps:
            self.invariants.stopped_for(job)
        self._kill()
        self.disk.sync()
        if job.kexec and self.kernel.loaded:
            self.jumped("job")
            return
        self.invariants.went_cold(job)
        self.booted(self.kernel.kind, CMDLINE[self.kernel.kind], None, by="cold")

    def do_power_loss(self, choice: int) -> None:
        self._kill()
        self.disk.lose_power(choice)
        self.invariants.power_lost()
        self.booted(self.kernel.kind, CMDLINE[self.kernel.kind], None, by="power")

    # The end of an example

    def do_mend(self) -> None:
        """Mend all that is broken, and see that an abort then puts everything back."""
        self._mend()
        self.invariants.recovered()

    def _mend(self) -> None:
        self.faults.clear()
        self.disk.trouble, self.broken = "", False
        self.systemd.answers, self.systemd.job = True, None
        self.config = CONFIGS[0]
        for service in self.everyone():
            service.behaviours.clear()
        for name in PEERS:
            self.files.pop(name, None)
        for name in self.setting.files:
            if name not in self.files:
                self._add_file(name)
        for peer in self.peers():
            peer.come_back()
        for _jump in range(2):  # what was under way may end in one
            if self.khod is None:
                self.start_khod("end")
            if (khod := self.khod) is not None:
                khod.reload(self.config)
                khod.release_hung()
            self.run(LONG)
            self.invariants.hold()
        self._abort_all()

    def _abort_all(self) -> None:
        """Abort, by force where that is needed, and give up what waits."""
        for force in (False, True):
            if (khod := self.khod) is None:
                return
            operation = self._abort(khod, force=force)
            self.run("end")
            if operation.over and operation.error is None and not self.kernel.loaded and not self.kernel.active:
                break
        self.run(LONG)  # whoever is back takes what it left, or cannot, and is asked no more
        for name in self.invariants.claims():
            if (khod := self.khod) is not None:
                khod.begin("forget", partial(khod.engine.forget_producer, name), about=name)
                self.run("end")
        self.run(LONG)
