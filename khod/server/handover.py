"""io.kho.Handover over one engine."""

import asyncio
import os
from collections.abc import AsyncIterator

from asyncvarlink import (
    FileDescriptor,
    LastResult,
    varlinkmethod,
)

from khod import model
from khod.engine import Engine
from khod.errors import Unreachable, UsageError
from khod.protocol import Handover, NextKernel, TreeReply, to_wire
from khod.region import Region
from khod.server.connection import CONNECTION, privileged, wired
from khod.target import Given, Request

MAX_QUEUE = 1 << 15
"""Events kept for a monitor that does not read; then it is dropped.

Two a verb for as many producers as one user may have, there and back: they are shared, a reference each.
"""

Queue = asyncio.Queue[model.Event | Exception]
"""What a monitor is to be told: events, then how it ends."""


class Service(Handover):
    """The interface over one engine."""

    render_interface_description = Handover.render_interface_description  # with the words it was described in

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._monitors: set[Queue] = set()
        self._last = model.Event(0.0, model.Phase.idle, "", "")

    def publish(self, event: model.Event) -> None:
        """Give an event to every monitor; one that does not read is dropped."""
        self._last = event
        for queue in list(self._monitors):
            if queue.qsize() < MAX_QUEUE:
                queue.put_nowait(event)
            else:
                self._monitors.discard(queue)
                queue.put_nowait(LastResult(self._last))

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> model.Status:
        with wired():
            return await self._engine.status()

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Monitor(self) -> AsyncIterator[model.Event]:
        queue: Queue = asyncio.Queue()
        self._monitors.add(queue)
        # An error, not a last result: the library leaves the generator of a result it cannot send unclosed.
        CONNECTION.get().on_end.append(lambda: queue.put_nowait(to_wire(Unreachable("The client is gone"))))
        try:
            yield await self._engine.now()
            while isinstance(item := await queue.get(), model.Event):
                yield item
            raise item
        finally:
            self._monitors.discard(queue)

    def close(self) -> None:
        """End every monitor."""
        for queue in self._monitors:
            queue.put_nowait(LastResult(self._last))

    @varlinkmethod(return_parameter="checks")
    async def Check(self, *, kernel: NextKernel | None = None) -> list[model.Check]:
        with wired():
            if kernel is not None:
                self._privileged("have khod look at an image")
            return await self._engine.check(_request(kernel))

    @varlinkmethod(return_parameter="plan")
    async def Plan(
        self, *, kernel: NextKernel | None = None, now: bool | None = None, load_only: bool | None = None
    ) -> model.Plan:
        with wired():
            if kernel is not None:
                self._privileged("have khod look at an image")
            return await self._engine.plan(_request(kernel, now=now, load_only=load_only))

    @varlinkmethod(return_parameter="status")
    async def Activate(self) -> model.Status:
        with wired():
            self._privileged("activate")
            await self._engine.activate()
            return await self._engine.status()

    @varlinkmethod(return_parameter="status")
    async def Abort(self, *, force: bool | None = None) -> model.Status:
        with wired():
            self._privileged("abort")
            await self._engine.abort(force=bool(force))
            return await self._engine.status()

    @varlinkmethod(return_parameter="status")
    async def Kexec(
        self,
        *,
        kernel: NextKernel | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
        hold: bool | None = None,
    ) -> model.Status:
        with wired():
            self._privileged("kexec")
            await self._engine.kexec(_request(kernel, now=now, load_only=load_only, hold=hold))
            return await self._engine.status()

    @varlinkmethod(return_parameter="producers")
    async def Producers(self) -> list[model.Producer]:
        with wired():
            return await self._engine.producers()

    @varlinkmethod(return_parameter="producers")
    async def Rehearse(self, *, name: str) -> list[model.Producer]:
        with wired():
            self._privileged("test a producer")
            return await self._engine.rehearse(name)

    @varlinkmethod
    async def Forget(self, *, name: str) -> None:
        with wired():
            self._privileged("forget a producer")
            await self._engine.forget(name)

    @varlinkmethod
    async def Tree(self, *, side: str) -> TreeReply:
        with wired():
            self._privileged("read the state tree")
            tree = await self._engine.tree(side)
            return {"names": ["", *tree.blobs], "blobs": [_memfd(blob) for blob in (tree.root, *tree.blobs.values())]}

    @varlinkmethod(return_parameter="snapshots")
    async def Snapshots(self) -> list[model.Snapshot]:
        with wired():
            self._privileged("list the snapshots")
            return await self._engine.snapshots()

    @varlinkmethod(return_parameter="regions")
    async def Scratch(self) -> list[Region]:
        with wired():
            return await self._engine.scratch()

    def _privileged(self, what: str) -> None:
        privileged(what, self._engine.config.access.group)


def _request(
    kernel: NextKernel | None, *, now: bool | None = None, load_only: bool | None = None, hold: bool | None = None
) -> Request:
    """What the engine is asked, with the descriptors of this call; UsageError where it makes no sense."""
    asked, flags = kernel or NextKernel(), {"now": bool(now), "load_only": bool(load_only), "hold": bool(hold)}
    files, names = asked.initrds or [], asked.initrd_names or []
    if names and len(names) != len(files):
        raise UsageError(
            f"{len(files)} initrds and {len(names)} names", where="initrd_names", remedy="Name each or none."
        )
    if asked.image is None and (files or asked != NextKernel()):
        raise UsageError("An initrd or a command line without an image", where="kernel.image", remedy="Add --image.")
    initrds = [Given(file.fileno(), names[at] if names else f"initrd {at + 1}") for at, file in enumerate(files)]
    return Request(
        None if asked.image is None else Given(asked.image.fileno(), asked.image_name or "the image"),
        tuple(initrds),
        asked.cmdline,
        bool(asked.reuse_cmdline),
        asked.append,
        tuple(asked.remove or ()),
        **flags,
    )


def _memfd(blob: bytes) -> FileDescriptor:
    fd = os.memfd_create("khod-tree", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(blob)
    return FileDescriptor(fd, should_close=True)
