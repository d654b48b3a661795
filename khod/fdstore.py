"""The service manager's file descriptor store: what is in it outlives khod, and with LUO the kernel too.

systemd keeps what `FDSTORE=1` sends until `FDSTOREREMOVE=1` names it, passes it to the next khod
(LISTEN_FDNAMES), and from 261 on carries the LUO sessions in it across `systemctl kexec`.
"""

import asyncio
import os
from typing import Protocol

import systemd.daemon

SETTLE = 10.0
"""Seconds the service manager has to have read what it was sent."""


class FdStore(Protocol):
    """Where descriptors are kept beside khod."""

    def put(self, name: str, fd: int) -> None:
        """Keep a descriptor under a name; the given one stays the caller's."""

    def remove(self, name: str) -> None:
        """Close what is kept under a name."""

    async def settle(self) -> None:
        """Wait until everything sent so far was taken in; TimeoutError."""


class ServiceManager:
    """systemd's; without one (NOTIFY_SOCKET is not set) nothing is kept, and khod's own descriptors must do."""

    def put(self, name: str, fd: int) -> None:
        # FDPOLL=0: systemd would drop a descriptor that reports an error or its end.
        systemd.daemon.notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fds=[fd])

    def remove(self, name: str) -> None:
        systemd.daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    async def settle(self) -> None:
        if not os.environ.get("NOTIFY_SOCKET"):
            return
        reader, writer = os.pipe()
        try:
            systemd.daemon.notify("BARRIER=1", fds=[writer])
        finally:
            os.close(writer)
        loop, closed = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(
            reader, closed.set
        )  # the other end is closed when the message was read, as sd_notify_barrier(3) has it
        try:
            async with asyncio.timeout(SETTLE):
                await closed.wait()
        finally:
            loop.remove_reader(reader)
            os.close(reader)


def passed() -> dict[str, int]:
    """What the service manager passed at start, by name; close-on-exec from here on."""
    found: dict[int, str] = systemd.daemon.listen_fds_with_names()
    for fd in found:
        os.set_inheritable(fd, False)
    return {name: fd for fd, name in found.items()}
