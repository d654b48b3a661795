# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard: during a handover, a device that appears or disappears ends the handover or is noted.

The guard receives the kernel's own uevents. Only add, remove, online and offline count; the last two are sent when
processors or blocks of memory are switched. The other actions (change, bind, unbind, move) report on a device that
stays. An event that was requested by a write to a `uevent` file (`udevadm trigger`) does not count either: the kernel
marks it with SYNTH_UUID, and no device has appeared or disappeared.

Uevents of a network interface are sent only to the network namespace of that interface, all others to every network
namespace that belongs to the initial user namespace (lib/kobject_uevent.c).
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from khod.abi.devices import BOUND_DEVICES
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import Failed, errno_text

if TYPE_CHECKING:
    import pyudev

    from khod.engine import udev
else:
    pyudev = defer_module("pyudev")
    udev = defer_module("khod.engine.udev")

SO_RCVBUFFORCE = 33
"""include/uapi/asm-generic/socket.h. Python's socket module lacks it."""
QUEUE_BYTES = 8 << 20
"""Maximum bytes of events that wait to be read. The kernel doubles it, and counts 0.8 KiB for the shortest event, 1.3
KiB for most. So 13,000 events fit: more than the 8,192 that are sent when a terabyte of memory is added in blocks of
128 MiB."""
BATCH_EVENTS = 256
"""Events that are read before other tasks of the event loop have a turn."""

ACTION_TEXT = {"add": "was added", "remove": "was removed", "online": "came online", "offline": "went offline"}
GONE = ("remove", "offline")
MAX_LINKS = 40  # as the kernel's MAXSYMLINKS
DEVICES = "/dev"
LOST = "lost"
UNREADABLE = "unreadable"
NO_DEVICE = {
    LOST: "the kernel sent more device events than could be read: some were lost",
    UNREADABLE: "a device event could not be read",
}


class Severity(enum.Enum):
    """What an event means for the handover: `abort` ends it, `record` only notes it."""

    abort = "abort"
    record = "record"


@dataclass(frozen=True)
class Uevent:
    """One message from the kernel.

    `device` is a path below /sys, `node` one below /dev ("" if the device has none). A `synthetic` event was requested
    by a write to the device's `uevent` file.
    """

    action: str
    subsystem: str
    device: str
    node: str = ""
    synthetic: bool = False


@dataclass(frozen=True)
class Seen:
    """An event that counts. `producers` are the names of those whose device disappeared.

    The action is the kernel's, or LOST or UNREADABLE, which have neither a subsystem nor a device.
    """

    severity: Severity
    event: Uevent
    producers: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return it in words, without a full stop: `pci device 0000:00:05.0 was added`."""
        event = self.event
        if event.action in NO_DEVICE:
            return NO_DEVICE[event.action]
        node = f" ({event.node})" if event.node else ""
        noun = "producers" if len(self.producers) > 1 else "producer"
        owners = f" of {noun} {', '.join(self.producers)}" if self.producers else ""
        return f"{event.subsystem} device {os.path.basename(event.device)}{node}{owners} {ACTION_TEXT[event.action]}"


@dataclass(frozen=True)
class Watch:
    """What counts: events of subsystems in `abort` or `record` (abort wins), and the removal of producers' devices.

    `devices` are pairs of a producer's name and a path below /dev or /sys without symbolic links.
    """

    abort: frozenset[str]
    record: frozenset[str]
    devices: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        """Whether any event could count."""
        return bool(self.abort or self.record or self.devices)

    def judge_event(self, event: Uevent) -> Seen | None:
        """Return what an event means, None if it does not count."""
        if event.synthetic or event.action not in ACTION_TEXT:
            return None
        owners = self._owners_of(event) if event.action in GONE else ()
        if owners or event.subsystem in self.abort:
            return Seen(Severity.abort, event, owners)
        return Seen(Severity.record, event) if event.subsystem in self.record else None

    def missed_events(self, action: str) -> Seen:
        """Return what events mean that could not be read: any of those that count may have been among them.

        `action` is LOST or UNREADABLE.
        """
        severity = Severity.abort if self.abort or self.devices else Severity.record
        return Seen(severity, Uevent(action, "", ""))

    def _owners_of(self, event: Uevent) -> tuple[str, ...]:
        """Return the producers that name this device, or one below it, which disappears with it."""
        below = f"{event.device}/"
        paths = (event.device, event.node)
        return tuple(sorted({name for name, path in self.devices if path in paths or path.startswith(below)}))


class Netlink:
    """The kernel's uevents from now on; OSError if the socket is not available (a sandbox, a limit)."""

    def __init__(self, context: pyudev.Context) -> None:
        # The kernel's messages, not udev's: udevd sends its own only after its rules have run, however long they take,
        # and udevd itself may be stopped. Nothing that udev adds to an event is needed here. A filter would save
        # nothing: libudev's filter runs in the kernel only for udev's messages.
        try:
            self._monitor = pyudev.Monitor.from_netlink(context, source="kernel")
        except OSError as error:
            number = ctypes.get_errno()  # libudev's errno, which pyudev does not report
            raise OSError(number, os.strerror(number)) from error
        self._socket = socket.fromfd(self._monitor.fileno(), socket.AF_NETLINK, socket.SOCK_RAW)
        try:
            self._resize_buffer(QUEUE_BYTES)
            self._monitor.start()
        except OSError:
            self._socket.close()
            raise

    def _resize_buffer(self, size: int) -> None:
        # Not with pyudev, which up to 0.24.4 takes libudev's result 1 for an error. Without CAP_NET_ADMIN the limit is
        # net.core.rmem_max; a queue that is too short is noticed (LOST).
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is an event, or after an overflow."""
        return self._socket.fileno()

    def receive_event(self) -> Uevent | None:
        """Return the next message, None if there is none yet.

        Raises OSError (ENOBUFS) once after an overflow. A MemoryError also means that a message was lost. ValueError
        for a message that libudev does not understand, or that is not UTF-8.
        """
        # An overflow leaves an error at the socket. pyudev's poll() raises it without clearing it, so it would raise
        # forever, and the event loop would spin. Reading SO_ERROR clears it.
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        device = self._monitor.poll(timeout=0)
        if device is None:
            return None
        return Uevent(
            device.action or "",
            device.subsystem or "",
            device.sys_path,
            device.device_node or "",
            "SYNTH_UUID" in device.properties,
        )

    def close(self) -> None:
        """Stop receiving events."""
        self._socket.close()
        del self._monitor  # pyudev's way to close its descriptor


class Guard:
    """Watches between start() and stop(), in the event loop; `happened` is called there with each event that counts.

    `happened` may stop the guard; it is not called after that.
    """

    def __init__(self, happened: Callable[[Seen], None]) -> None:
        self._happened = happened
        self._watch = Watch(frozenset(), frozenset())
        self._netlink: Netlink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watching(self) -> bool:
        """Whether it watches now."""
        return self._netlink is not None

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        """Watch from now on; if it watches already, only what counts is replaced.

        `abort` and `record` are names of kernel subsystems (pci, cpu, memory, block, net, ...). `devices` are the
        producers' devices, by the producer's name, as paths below /dev or /sys; symbolic links are resolved now,
        because they disappear with the device. If no event could count, nothing is opened. Takes 0.2 to 0.4 ms. Failed
        if the kernel's events cannot be received.
        """
        found = tuple((name, _resolve_device(path)) for name, paths in devices.items() for path in paths)
        self._watch = Watch(frozenset(abort), frozenset(record), found)
        if self._netlink is not None or not self._watch:
            return
        loop = asyncio.get_running_loop()
        try:
            self._netlink = Netlink(udev.CONTEXT)
        except OSError as error:
            raise Failed(
                f"Device events cannot be watched: {errno_text(error)}",
                where="AF_NETLINK",
                remedy="Let khod have such sockets (RestrictAddressFamilies=), or give the guard nothing to watch for.",
            ) from error
        self._loop = loop
        self._loop.add_reader(self._netlink.fileno(), self.process_pending)

    def stop(self) -> None:
        """Stop watching; events that were not read yet are dropped."""
        if self._netlink is None or self._loop is None:
            return
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()
        self._netlink = self._loop = None

    def process_pending(self) -> None:
        """Report up to BATCH_EVENTS events that wait; called by the event loop, and before each step of a handover."""
        for _ in range(BATCH_EVENTS):
            if self._netlink is None:
                return
            try:
                event = self._netlink.receive_event()
            except ValueError:
                seen: Seen | None = self._watch.missed_events(UNREADABLE)
            except (OSError, MemoryError):
                seen = self._watch.missed_events(LOST)
            else:
                if event is None:
                    return
                seen = self._watch.judge_event(event)
            if seen is not None:
                self._happened(seen)


def _resolve_device(path: str) -> str:
    """Return the path without symbolic links, as they are on the host.

    realpath(3) asks lstat(2), which AppArmor grants only with the right to read, and leaves the rest of a path as it is
    where that is refused. readlink(2) is not refused, and the links below /dev are each of one step.
    """
    # An empty directory at the place is what a unit without the mount leaves of one that had it.
    bound = BOUND_DEVICES if os.access(f"{BOUND_DEVICES}/null", os.F_OK) else DEVICES
    for _ in range(MAX_LINKS):
        before, path = path, os.path.realpath(_move_path(path, DEVICES, bound))
        with suppress(OSError):
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        path = _move_path(path, bound, DEVICES)
        if path == before:
            break
    return path


def _move_path(path: str, old: str, new: str) -> str:
    """Return a path below the directory `old` as one below `new`; any other as it is."""
    return new + path[len(old) :] if path.startswith(f"{old}/") else path
