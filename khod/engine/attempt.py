# SPDX-License-Identifier: LGPL-2.1-or-later
"""One attempt at a handover: calls to producers and to the kernel, the jump, and the undo next to each step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from khod.concurrency.bounded import CUT_SECONDS
from khod.config import Config, Settings
from khod.deferred import defer_module
from khod.engine.quiescence import Quiescence
from khod.errors import Exit, Failed, KhoError, Refused
from khod.handover.machine import Machine
from khod.handover.record import Store
from khod.kernel.kexec import Kexec
from khod.kernel.protocol import KhoKernel, Tree
from khod.kernel.thread import Workers
from khod.kernel.traits import kernel_producers
from khod.model import Generation, Step, Terms
from khod.producers.barrier import Barrier, Member, Participant, Verb, step_timeout_error
from khod.quiesce.outcome import Started
from khod.systemd.shutdown import ImmediateExecutor

if TYPE_CHECKING:
    from khod.handover import verify
    from khod.kernel import explain
    from khod.kernel import log as kernel_log
    from khod.systemd.shutdown import Executor, Shutdown
    from khod.target.target import Target
else:
    verify = defer_module("khod.handover.verify")
    explain = defer_module("khod.kernel.explain")
    kernel_log = defer_module("khod.kernel.log")

LOG = logging.getLogger(__name__)
T = TypeVar("T")
VERBS = {Step.prepare: Verb.prepare, Step.freeze: Verb.freeze}


class JumpUnderWay(KhoError):
    """The jump was requested and may still happen, so nothing may be undone."""

    exit = Exit.not_rolled_back


class Attempt:
    """The steps of one attempt. Every method raises KhoError; kernel calls have the deadlines of the configuration.

    `everyone` returns the producers that are present now. `joined` is called when a producer has joined since the
    attempt began, `frozen` after every producer has frozen; its errors are only logged. `shutdown` asks systemd whether
    the host is on its way into the kexec. `units` returns what the step quiesce stops, as recorded, `terms` what must
    hold for the handover.

    One class of this size: each step stands next to its undo.
    """

    def __init__(
        self,
        kernel: KhoKernel | None,
        kexec: Kexec,
        workers: Workers,
        store: Store,
        settings: Settings,
        barrier: Barrier,
        *,
        everyone: Callable[[], Iterable[Participant]] = list,
        joined: Callable[[Attempt], None] = lambda _attempt: None,
        frozen: Callable[[], Awaitable[None]] | None = None,
        shutdown: Shutdown | None = None,
        quiescence: Quiescence | None = None,
        units: Callable[[], tuple[str, ...]] = tuple,
        terms: Callable[[], Terms] = Terms,
    ) -> None:
        self.kernel = kernel
        self.barrier = barrier
        self.resumed = False
        """Whether an earlier khod began the attempt: the producers it told something must return before the next
        step."""
        self.past: list[Verb] = []
        """The verbs that every producer has carried out; a producer that joins late is told them first."""
        self.going_down = False
        """Whether another program has sent the host into the kexec: khod then need not request the jump."""
        self._kexec = kexec
        self._workers = workers
        self._store = store
        self._settings = settings
        self._everyone = everyone
        self._joined = joined
        self._frozen = frozen
        self._shutdown = shutdown
        self._quiescence = quiescence
        self._units = units
        self._terms = terms
        self._target: Target | None = None
        self._executor: Executor | None = None
        self._orderly: Executor | None = None
        self._callers: Sequence[str] = ()
        self._execution: asyncio.Future[None] | None = None
        self._do: dict[Step, Callable[[], Awaitable[None]]] = {
            Step.prepare: lambda: self._tell_verb(Verb.prepare),
            Step.quiesce: self._stop_host,
            Step.freeze: lambda: self._tell_verb(Verb.freeze),
            Step.activate: self._activate_kernel,
            Step.load: self._load_image,
            Step.execute: self._execute_jump,
        }

    def adopt_steps(self, machine: Machine) -> None:
        """Resume an attempt of an earlier khod: the verbs of the recorded steps count as carried out."""
        self.past = [VERBS[step] for step in machine.done if step in VERBS]
        self.resumed = bool(machine.done)

    def set_target(
        self, target: Target | None, executor: Executor, orderly: Executor, callers: Sequence[str] = ()
    ) -> None:
        """Set the image to load, None if one is loaded already, the executor that makes the jump, and who asked for it.

        `orderly` is the executor for a host with files that only `systemctl kexec` hands over, which may turn out once
        its services are stopped. `callers` are units of systemd, which quiesce does not stop.
        """
        self._target, self._executor, self._orderly, self._callers = target, executor, orderly, callers

    def drop_target(self) -> None:
        """Free the images' memory once the kernel's thread no longer uses them."""
        if self._target is not None:
            self._workers.kernel.call_later(self._target.close)
            self._target = None

    @property
    def _config(self) -> Config:
        return self._settings.under(self._terms())

    async def do_step(self, step: Step) -> None:
        """Carry a step out."""
        await self._do[step]()

    # Producers

    @property
    def preserving_producers(self) -> list[str]:
        """The names of the producers that have handed over files."""
        return [member.producer.name for member in self.barrier.members if member.producer.to_record().kept]

    async def wait_reconnected(self) -> None:
        """After a restart of khod, wait for every producer that was told something; Refused if one does not return."""
        await self.barrier.gather_in()
        self.resumed = False

    def admit_late(self) -> list[Member]:
        """Add the producers that have joined since, and return those that must be told the verbs in `past`.

        ConfigError if a producer's file is wrong, or if the order is a cycle.
        """
        new = self.barrier.add_producers(self._everyone())
        if new:
            self._joined(self)
        return new if self.past else []

    async def tell_producers(self, verb: Verb, among: Sequence[Member] | None = None) -> None:
        """Tell all producers, or those in `among`, within one deadline for all of them together.

        Leaders are told `prepare` alone, before the others, and have as long as their timeout says: the deadline is for
        the others. Refused with a producer's veto; Failed if the deadline passes.
        """
        if leaders := self.barrier.leaders:
            among = self.barrier.members if among is None else among
            if verb is Verb.prepare:
                await self.barrier.broadcast(verb, [member for member in among if member in leaders])
            among = [member for member in among if member not in leaders]
        deadlines = self._config.deadlines
        deadline = deadlines.prepare if verb is Verb.prepare else deadlines.freeze
        try:
            async with asyncio.timeout(deadline):
                await self.barrier.broadcast(verb, among, seconds=deadline)
        except TimeoutError:
            raise step_timeout_error(self.barrier.members, verb, deadline) from None
        if verb is Verb.freeze and self._frozen is not None:
            try:
                await self._frozen()
            except Exception:  # what was not read is not compared after the jump
                LOG.exception("The preserved files could not be read")

    async def confirm_leaders(self) -> None:
        """Have the leaders confirm what `prepare` gave them, by the same verb again; Refused if one cannot."""
        await self.barrier.broadcast(Verb.prepare, [member for member in self.barrier.leaders if member.told])

    async def undo_verb(self, verb: Verb) -> list[tuple[str, KhoError]]:
        """Tell every producer that was told `verb` its undo; return the names and errors of those that failed.

        The name is "" if none of them could be told.
        """
        self.past = [past for past in self.past if past is not verb]
        return await self.barrier.undo_verb(verb)

    async def _tell_verb(self, verb: Verb) -> None:
        await self.tell_producers(verb)
        self.past.append(verb)

    # The rest of the host

    async def select_units(self) -> tuple[str, ...]:
        """Return the units that the step quiesce is to stop, in the order of their start; Refused if it cannot."""
        assert self._quiescence is not None, "a handover that stops the host"
        await self._quiescence.require_uninhibited(self._config)  # the check may be minutes ago: some prepare for long
        return (await self._quiescence.survey_host(self._callers)).require_clear().selection.start_order

    async def _stop_host(self) -> None:
        assert self._quiescence is not None, "as above"
        if await self._quiescence.stop_host(tuple(reversed(self._units())), self._callers):
            self._executor = self._orderly

    async def start_host(self) -> Started:
        """Start again what quiesce has stopped."""
        names = self._units()
        if not names:
            return Started()
        assert self._quiescence is not None, "it has stopped them"
        return await self._quiescence.start_host(names)

    async def _require_rest(self) -> None:
        """Refused if the host is no longer as quiesce has left it."""
        if self._quiescence is not None:
            await self._quiescence.require_rest(self._config)

    @property
    def stopped_units(self) -> tuple[str, ...]:
        """The units that quiesce stops, as recorded."""
        return self._units()

    # Kernel

    async def _activate_kernel(self) -> None:
        snapshot = await self._call_kernel(Step.activate, self._activate_and_read, self._config.deadlines.activate)
        self._require_state(snapshot)
        # Not synced here: during the blackout a sync takes too long. The file must be on the disk only for a jump, and
        # both executors sync before it.
        await self._workers.disk.call_within(
            lambda: self._store.snapshots.write_tree(self.barrier.run, snapshot),
            "writing the snapshot",
            self._config.deadlines.activate,
        )

    def _require_state(self, snapshot: Tree) -> None:
        """Refuse a tree without the state that the configuration requires; nothing else in it is examined here."""
        config = self._settings.current
        if not config.policy.require_state and not config.producers.require_kernel:
            return
        assert self.kernel is not None, "as in _activate_and_read"
        present = kernel_producers(snapshot, self.kernel.generation)
        if config.policy.require_state and not present:
            raise Refused(
                "Nothing would be handed over: no producer in the kernel has any state",
                where="policy.require_state",
                remedy="Give the kernel state to keep (reserve_mem=, liveupdate=on), or unset policy.require_state.",
            )
        if missing := sorted(set(config.producers.require_kernel) - present.keys()):
            raise verify.missing_state_error(missing)

    def _activate_and_read(self) -> Tree:
        self._kexec.write_kmsg("entering the active phase")
        assert self.kernel is not None, "a handover begins on a kernel with KHO"
        self.kernel.activate()
        return self.kernel.outgoing_tree()

    async def _load_image(self) -> None:
        assert self._target is not None, "a request with an image"
        target, initrd = self._target, self._target.initrd
        await self._call_kernel(
            Step.load,
            lambda: self._kexec.load_image(target.kernel.fd, None if initrd is None else initrd.fd, target.cmdline),
            self._config.deadlines.load,
        )

    @property
    def undo_seconds(self) -> float:
        """Maximum seconds of the undo of one kernel call; the deadline of the call itself passes CUT_SECONDS before."""
        return self._settings.current.deadlines.rollback + CUT_SECONDS

    async def undo_activate(self) -> None:
        """Leave the active phase if the kernel is in it; Failed if the kernel could not be probed."""
        kernel = self.kernel
        if kernel is None:
            raise Failed(
                "The kernel could not be asked, so how it leaves its active phase is not known",
                where="leaving the active phase",
            )

        def leave_active() -> None:
            if kernel.is_active():
                kernel.deactivate()

        await self._undo_call(Step.activate, "leaving the active phase", leave_active)

    async def undo_load(self) -> None:
        """Unload the image, if one is loaded."""

        def unload_image() -> None:
            if self._kexec.is_loaded():
                self._kexec.unload_image()

        await self._undo_call(Step.load, "unloading the image", unload_image)

    async def _call_kernel(self, step: Step, function: Callable[[], T], deadline: float) -> T:
        def listened() -> T:
            with self._kexec.listen_to_log() as quote:
                try:
                    return function()
                except OSError as error:
                    raise explain.explain_errno(
                        step, error, quote(kernel_log.ABOUT[step]), generation=self._generation
                    ) from error

        return await self._workers.kernel.call_within(listened, step.value, deadline)

    async def _undo_call(self, step: Step, what: str, function: Callable[[], None]) -> None:
        def listened() -> None:
            with self._kexec.listen_to_log() as quote:
                try:
                    function()
                except OSError as error:
                    raise explain.explain_undo(
                        step, error, quote(kernel_log.ABOUT[step]), generation=self._generation
                    ) from error

        await self._workers.kernel.call_within(listened, what, self._settings.current.deadlines.rollback)

    # The jump

    @property
    def immediate(self) -> bool:
        """Whether the executor calls reboot(2) itself, without systemd."""
        return isinstance(self._executor, ImmediateExecutor)

    @property
    def in_kernel(self) -> bool:
        """Whether reboot(2) was called and has not returned: it may jump at any moment."""
        return isinstance(self._executor, ImmediateExecutor) and self._executor.in_kernel

    async def goes_down(self) -> bool | None:
        """Return whether the host is on its way into the kexec; None if that is not known."""
        try:
            return None if self._shutdown is None else await self._shutdown()
        except Exception:  # after any error it is not known
            LOG.exception("systemd could not be asked whether the host goes down")
            return None

    async def wait_executor(self) -> None:
        """After JumpUnderWay, wait until the executor returns; raise what it failed with.

        A cancelled executor has not failed: then only systemd knows whether the jump comes.
        """
        if self._execution is None:
            return
        await asyncio.wait({self._execution})
        if not self._execution.cancelled():
            await self._execution_failed(self._execution)

    async def _execute_jump(self) -> None:
        """Jump, or have systemd do it; JumpUnderWay if the jump was requested and may still happen."""
        if self.going_down:
            return
        assert self._executor is not None, "a request that jumps"
        deadline = self._settings.current.deadlines.execute
        # Before an orderly jump systemd stops what runs, and asks for inhibitors.
        executor = self._executor
        jump = executor(self._require_rest) if isinstance(executor, ImmediateExecutor) else executor()
        self._execution = execution = asyncio.ensure_future(jump)
        try:
            await asyncio.wait({execution}, timeout=deadline)
        except asyncio.CancelledError:
            await self._stop_executor(execution)
            raise
        if not execution.done():
            await self._stop_executor(execution)
            if self.immediate:
                raise Failed(
                    f"sync(2) or FIFREEZE did not come back within {deadline:g} s: the host does not jump",
                    where="sync(2)",
                    remedy="Look for the file system that hangs: journalctl -k",
                )
            if await self.goes_down() is None:
                raise JumpUnderWay(
                    f"systemctl kexec did not come back within {deadline:g} s, and systemd does not say whether the "
                    "host goes down: nothing was undone",
                    where="systemctl kexec",
                    remedy="If systemctl list-jobs shows no kexec.target: `Abort(force)`",
                )
            raise Failed(
                f"systemctl kexec did not come back within {deadline:g} s, and the host does not go down",
                where="systemctl kexec",
                remedy="Look at journalctl -b, or jump at once: `Kexec(now)`",
            )
        try:
            await self._execution_failed(execution)
        except Exception:
            # systemctl may fail after systemd has accepted its request. An immediate jump does not involve systemd.
            if not self.immediate:
                await self._refuse_under_shutdown()
            raise

    async def _refuse_under_shutdown(self) -> None:
        """Raise JumpUnderWay if the host is on its way into the kexec."""
        if await self.goes_down():
            raise JumpUnderWay(
                "The host is on its way into the next kernel: nothing was undone",
                where="kexec.target",
                remedy="Wait: where it does not go down, khod puts everything back by itself.",
            )

    async def _stop_executor(self, execution: asyncio.Future[None]) -> None:
        """Cancel an executor that only requests the jump; JumpUnderWay if it cannot be, or if the host goes down."""
        if self.in_kernel:
            raise JumpUnderWay(
                "The kernel has not come back from reboot(2) and may still jump: nothing was undone",
                where="reboot(LINUX_REBOOT_CMD_KEXEC)",
                remedy="Wait: where it comes back, khod puts everything back by itself. Look at the kernel log.",
            )
        execution.cancel()
        await asyncio.wait({execution}, timeout=CUT_SECONDS)
        await self._refuse_under_shutdown()

    async def _execution_failed(self, execution: asyncio.Future[None]) -> None:
        with self._kexec.listen_to_log() as quote:
            try:
                await asyncio.shield(execution)
            except OSError as error:
                raise explain.explain_errno(Step.execute, error, quote(kernel_log.ABOUT[Step.execute])) from error

    @property
    def _generation(self) -> Generation:
        return self.kernel.generation if self.kernel else Generation.none
