"""A thin typed client of io.kho.Handover: one connection, methods that return the model or raise KhoError."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from asyncvarlink import (
    FileDescriptor,
    GenericVarlinkErrorReply,
    TypedVarlinkErrorReply,
    VarlinkClientProtocol,
    VarlinkErrorReply,
    connect_unix_varlink,
)

from khod.errors import KhoError, Unreachable
from khod.model import Check, Event, Status
from khod.protocol import SOCKET, Handover, from_wire

ANSWER = 60.0
"""Seconds khod has to say how it stands; its start, a rollback included, comes before."""

START = "Start it with: systemctl start kho-handover"


class Client:
    """One connection to khod. Every method raises KhoError; Unreachable where the connection ends."""

    def __init__(self, protocol: VarlinkClientProtocol) -> None:
        self._proxy = protocol.make_proxy(Handover)

    async def status(self) -> Status:
        """How it stands; Unreachable where khod takes the call and is silent (it may be starting over and over)."""
        try:
            async with asyncio.timeout(ANSWER):
                found: Status = (await self._call("Status"))["status"]
                return found
        except TimeoutError:
            raise Unreachable(
                f"khod does not answer within {ANSWER:g} s", remedy="Look at: journalctl -u kho-handover"
            ) from None

    async def check(self) -> list[Check]:
        """The preflight checks."""
        return (await self._call("Check"))["checks"]  # type: ignore[no-any-return]

    async def activate(self) -> Status:
        """Go to `active`."""
        return (await self._call("Activate"))["status"]  # type: ignore[no-any-return]

    async def abort(self, *, force: bool) -> Status:
        """Put everything back."""
        return (await self._call("Abort", force=force))["status"]  # type: ignore[no-any-return]

    async def kexec(self, **request: Any) -> Status:
        """Do what is left; `request` as io.kho.Handover.Kexec names it, None is left out.

        `image` and `initrd` are file descriptors; they stay the caller's.
        """
        given = {key: value for key, value in request.items() if value is not None}
        # The library closes a bare int it is given; wrapped, a descriptor keeps its owner.
        given |= {role: FileDescriptor(given[role]) for role in ("image", "initrd") if role in given}
        return (await self._call("Kexec", **given))["status"]  # type: ignore[no-any-return]

    async def tree(self, side: str) -> dict[str, bytes]:
        """A state tree's blobs by name, the root's is ""."""
        with await self._call("Tree", side=side) as reply:
            return {name: _contents(fd) for name, fd in zip(reply["names"], reply["blobs"], strict=True)}

    async def monitor(self) -> AsyncIterator[Event]:
        """Every change from now on, beginning with how it stands; ends with khod."""
        try:
            async for reply in self._proxy.Monitor():
                yield reply["event"]
        except (OSError, ValueError, VarlinkErrorReply) as error:
            raise _ours(error) from None

    async def _call(self, method: str, **parameters: Any) -> Any:
        try:
            return await getattr(self._proxy, method)(**parameters)
        except (OSError, ValueError, VarlinkErrorReply) as error:
            raise _ours(error) from None


@asynccontextmanager
async def connect(path: Path = Path(SOCKET)) -> AsyncIterator[Client]:
    """Connect to khod; Unreachable names the socket and the likely cause."""
    try:
        transport, protocol = await connect_unix_varlink(VarlinkClientProtocol, path)
    except FileNotFoundError:
        raise Unreachable("khod is not running: its socket is not there", where=str(path), remedy=START) from None
    except ConnectionRefusedError:
        raise Unreachable("khod is not running: nothing listens on its socket", where=str(path), remedy=START) from None
    except OSError as error:
        raise Unreachable(f"khod cannot be reached: {error.strerror}", where=str(path), remedy=START) from None
    try:
        yield Client(protocol)
    finally:
        transport.close()
        await asyncio.sleep(0)


def _ours(error: Exception) -> KhoError:
    if isinstance(error, TypedVarlinkErrorReply | GenericVarlinkErrorReply):
        parameters: dict[str, Any] = error.parameters
        return from_wire(error.name, parameters) or KhoError(f"khod answered {error.name} {parameters or ''}".strip())
    if isinstance(error, ValueError):
        return Unreachable("What answers on the socket is not khod", remedy=START)
    return Unreachable("khod closed the connection", remedy="Look at: journalctl -u kho-handover")


def _contents(fd: FileDescriptor) -> bytes:
    number = fd.fileno()
    return os.pread(number, os.fstat(number).st_size, 0)
