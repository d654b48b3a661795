"""What each step of the machine does to producers and kernel, next to what its undo does."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from khod.config import Config
from khod.errors import Refused
from khod.executor import Executor
from khod.kernel.explain import explain, explain_undo
from khod.kernel.kexec import Kexec
from khod.kernel.log import ABOUT
from khod.kernel.protocol import KhoKernel, Tree
from khod.kernel.thread import KernelThread
from khod.model import Generation, Step
from khod.producers.barrier import Barrier, Member, Producer, Verb, silent
from khod.record import Store
from khod.target import Target
from khod.verify import producers, without

T = TypeVar("T")
VERBS = {Step.prepare: Verb.prepare, Step.freeze: Verb.freeze}


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
        producers: Callable[[], Iterable[Producer]],
    ) -> None:
        """Gather what they act on; `producers` gives those that are there by now."""
        self.kernel = kernel
        self.barrier = barrier
        self._producers = producers
        self.joined: Callable[[], None] = lambda: None
        """Called when somebody has joined the barrier since it began."""
        self._past: list[Verb] = []
        self._resumed = False
        self.target: Target | None = None
        self.executor: Executor | None = None
        self._kexec = kexec
        self._thread = thread
        self._store = store
        self._deadlines = config.deadlines
        self._require_state = config.policy.require_state
        self._require_kernel = config.producers.require_kernel
        self._do: dict[Step, Callable[[], Awaitable[None]]] = {
            Step.prepare: lambda: self._told(Verb.prepare),
            Step.freeze: lambda: self._told(Verb.freeze),
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
        """Carry a step out; before it whoever came since the last one is brought to where the others are."""
        await self._catch_up()
        await self._do[step]()

    def resume(self, done: Sequence[Step]) -> None:
        """Take up an attempt that an earlier khod began: these verbs are behind everyone."""
        self._past = [VERBS[step] for step in done if step in VERBS]
        self._resumed = bool(done)

    async def _catch_up(self) -> None:
        if self._resumed:
            await self.barrier.gather_in()
            self._resumed = False
        if new := self.barrier.admit(self._producers()):
            self.joined()
        for verb in self._past if new else []:
            await self._within(verb, new)

    async def undo(self, step: Step) -> None:
        """Put a step back; harmless where the step had no effect."""
        if step in VERBS:
            self._past = [verb for verb in self._past if verb is not VERBS[step]]
        await self._undo[step]()

    async def _told(self, verb: Verb) -> None:
        await self._within(verb, None)
        self._past.append(verb)

    async def _within(self, verb: Verb, among: Sequence[Member] | None) -> None:
        deadline = self._deadlines.prepare if verb is Verb.prepare else self._deadlines.freeze
        try:
            async with asyncio.timeout(deadline):
                await self.barrier.tell(verb, among)
        except TimeoutError:
            raise silent(self.barrier.members, verb, deadline) from None

    async def _activate(self) -> None:
        snapshot = await self._call(Step.activate, self._activate_and_look, self._deadlines.activate)
        assert self.kernel is not None, "as above"
        if self._require_state and not producers(snapshot, self.kernel.generation):
            raise Refused(
                "Nothing would be handed over: no producer in the kernel has any state",
                where="policy.require_state",
                remedy="Give the kernel state to keep (reserve_mem=, liveupdate=on), or unset policy.require_state.",
            )
        if missing := sorted(set(self._require_kernel) - producers(snapshot, self.kernel.generation).keys()):
            raise without(missing)
        # Not synced here: within the blackout that is too dear, and a lost file matters only without a
        # jump. Both executors sync before it.
        await asyncio.to_thread(self._store.snapshots.write, self.barrier.run, snapshot)

    def _activate_and_look(self) -> Tree:
        self._kexec.announce("entering the active phase")
        assert self.kernel is not None, "a handover begins on a kernel with KHO"
        self.kernel.activate()
        return self.kernel.tree()

    async def _deactivate(self) -> None:
        def leave() -> None:
            if self.kernel is not None and self.kernel.active():
                self.kernel.deactivate()

        await self._back(Step.activate, "leaving the active phase", leave)

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

        await self._back(Step.load, "unloading the image", unload)

    async def _execute(self) -> None:
        assert self.executor is not None, "a request that jumps"
        with self._kexec.listening() as said:
            try:
                await self.executor()
            except OSError as error:
                raise explain(Step.execute, error, said(ABOUT[Step.execute])) from error

    async def _stay(self) -> None:
        """Nothing to put back: the system goes on running."""

    async def _call(self, step: Step, function: Callable[[], T], deadline: float) -> T:
        def listened() -> T:
            with self._kexec.listening() as said:
                try:
                    return function()
                except OSError as error:
                    raise explain(step, error, said(ABOUT[step]), generation=self._generation) from error

        return await self._thread.call(listened, step.value, deadline)

    async def _back(self, step: Step, what: str, function: Callable[[], None]) -> None:
        def listened() -> None:
            with self._kexec.listening() as said:
                try:
                    function()
                except OSError as error:
                    raise explain_undo(step, error, said(ABOUT[step]), generation=self._generation) from error

        await self._thread.call(listened, what, self._deadlines.rollback)

    @property
    def _generation(self) -> Generation:
        return self.kernel.generation if self.kernel else Generation.none
