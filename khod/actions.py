"""What each step of the machine does to producers and kernel, next to what its undo does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from khod.config import Config
from khod.errors import Failed, KhoError, Refused
from khod.executor import Executor
from khod.kernel.explain import explain
from khod.kernel.kexec import Kexec
from khod.kernel.protocol import KhoKernel, Tree
from khod.kernel.thread import KernelThread
from khod.model import Step
from khod.producers.barrier import NO_ANSWER, Barrier, Verb
from khod.record import Store
from khod.target import Target
from khod.verify import producers

T = TypeVar("T")


class Actions:
    """The steps of one attempt. Every method raises KhoError; kernel calls have the deadlines of the config."""

    def __init__(
        self,
        kernel: KhoKernel | None,
        kexec: Kexec,
        thread: KernelThread,
        store: Store,
        config: Config,
        barrier: Barrier,
    ) -> None:
        self.kernel = kernel
        self.barrier = barrier
        self.target: Target | None = None
        self.executor: Executor | None = None
        self._kexec = kexec
        self._thread = thread
        self._store = store
        self._deadlines = config.deadlines
        self._require_state = config.policy.require_state
        self._do: dict[Step, Callable[[], Awaitable[None]]] = {
            Step.prepare: lambda: self._told(Verb.prepare, self._deadlines.prepare),
            Step.freeze: lambda: self._told(Verb.freeze, self._deadlines.freeze),
            Step.activate: self._activate,
            Step.load: self._load,
            Step.execute: self._execute,
        }
        self._undo: dict[Step, Callable[[], Awaitable[None]]] = {
            Step.prepare: lambda: barrier.undo(Verb.prepare),
            Step.freeze: lambda: barrier.undo(Verb.freeze),
            Step.activate: self._deactivate,
            Step.load: self._unload,
            Step.execute: self._stay,
        }

    async def do(self, step: Step) -> None:
        """Carry a step out."""
        await self._do[step]()

    async def undo(self, step: Step) -> None:
        """Put a step back; harmless where the step had no effect."""
        await self._undo[step]()

    async def _told(self, verb: Verb, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline):
                await self.barrier.tell(verb)
        except TimeoutError:
            silent = [member for member in self.barrier.members if member.answer == NO_ANSWER]
            waiting = ", ".join(member.producer.name for member in silent)
            raise Failed(
                f"Not every producer could {verb.value} within {deadline:g} s",
                where=waiting,
                remedy=f"Raise deadlines.{verb.value}, or look at these producers.",
            ) from None

    async def _activate(self) -> None:
        snapshot = await self._call(Step.activate, self._activate_and_look, self._deadlines.activate)
        assert self.kernel is not None, "as above"
        if self._require_state and not producers(snapshot, self.kernel.generation):
            raise Refused(
                "Nothing would be handed over: no producer in the kernel has any state",
                where="policy.require_state",
                remedy="Give the kernel state to keep (reserve_mem=, liveupdate=on), or unset policy.require_state.",
            )
        # Not synced here: within the blackout that is too dear, and a lost file matters only without a
        # jump. Both executors sync before it.
        await asyncio.to_thread(self._store.write_snapshot, snapshot)

    def _activate_and_look(self) -> Tree:
        self._kexec.announce("entering the active phase")
        assert self.kernel is not None, "a handover begins on a kernel with KHO"
        self.kernel.activate()
        return self.kernel.tree()

    async def _deactivate(self) -> None:
        def leave() -> None:
            if self.kernel is not None and self.kernel.active():
                self.kernel.deactivate()

        await self._back("leaving the active phase", leave)

    async def _load(self) -> None:
        assert self.target is not None, "a request with an image"
        target, initrd = self.target, self.target.initrd
        await self._call(
            Step.load,
            lambda: self._kexec.load(target.kernel.fd, None if initrd is None else initrd.fd, target.cmdline),
            self._deadlines.load,
        )

    async def _unload(self) -> None:
        def unload() -> None:
            if self._kexec.loaded():
                self._kexec.unload()

        await self._back("unloading the image", unload)

    async def _execute(self) -> None:
        assert self.executor is not None, "a request that jumps"
        try:
            await self.executor()
        except OSError as error:
            raise explain(Step.execute, error) from error

    async def _stay(self) -> None:
        """Nothing to put back: the system goes on running."""

    async def _call(self, step: Step, function: Callable[[], T], deadline: float) -> T:
        try:
            return await self._thread.call(function, step.value, deadline)
        except OSError as error:
            raise explain(step, error) from error

    async def _back(self, what: str, function: Callable[[], None]) -> None:
        try:
            await self._thread.call(function, what, self._deadlines.rollback)
        except OSError as error:
            raise KhoError(
                f"{what[0].upper()}{what[1:]} failed: {error.strerror}", where=str(error.filename)
            ) from error
