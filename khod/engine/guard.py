# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard: while a handover is under way, a device that comes or goes ends it or is noted.

It hears the kernel's own uevents. Those that count are add and remove, and online and offline, which is what
processors and blocks of memory send when they are switched. The others (change, bind, unbind, move) say
something of a device that stays. An event that somebody wrote into a `uevent` file (`udevadm trigger`) is
none either: the kernel marks it with SYNTH_UUID, and no device came or went.

Uevents of network interfaces reach only the network namespace the interface is in, all others every
namespace that belongs to the initial user namespace (lib/kobject_uevent.c).
"""

import asyncio
import ctypes
import enum
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pyudev

from khod.errors import Failed, errno_text

SO_RCVBUFFORCE = 33
"""include/uapi/asm-generic/socket.h. Python's socket module lacks it."""
QUEUE_BYTES = 8 << 20
"""Bytes of events that may wait to be read. The kernel doubles it and counts 0.8 KiB for the shortest event, 1.3 for
most: room for 13,000, more than the 8,192 that a terabyte of memory sends as it is added in blocks of 128 MiB."""
BATCH_EVENTS = 256
"""Events read before anyone else in the loop has a turn."""

ACTION_TEXT = {"add": "was added", "remove": "was removed", "online": "came online", "offline": "went offline"}
GONE = ("remove", "offline")
LOST = "lost"
UNREADABLE = "unreadable"
NO_DEVICE = {
    LOST: "the kernel sent more device events than could be read: some were lost",
    UNREADABLE: "a device event could not be read",
}


class Severity(enum.Enum):
    """What an event means for the handover: abort ends it, record only notes it."""

    abort = "abort"
    record = "record"


@dataclass(frozen=True)
class Uevent:
    """One message of the kernel's.

    `device` is a path below /sys, `node` the one below /dev ("" where it has none). A `synthetic` one was asked for
    by a write to the device's `uevent` file.
    """

    action: str
    subsystem: str
    device: str
    node: str = ""
    synthetic: bool = False


@dataclass(frozen=True)
class Seen:
    """An event that counts. `producers` are those whose device went away, by name.

    The action is the kernel's, or LOST or UNREADABLE; these two have neither subsystem nor device.
    """

    severity: Severity
    event: Uevent
    producers: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say it, without a full stop: `pci device 0000:00:05.0 was added`."""
        event = self.event
        if event.action in NO_DEVICE:
            return NO_DEVICE[event.action]
        node = f" ({event.node})" if event.node else ""
        noun = "producers" if len(self.producers) > 1 else "producer"
        owners = f" of {noun} {', '.join(self.producers)}" if self.producers else ""
        return f"{event.subsystem} device {os.path.basename(event.device)}{node}{owners} {ACTION_TEXT[event.action]}"


@dataclass(frozen=True)
class Watch:
    """What counts: events of a subsystem in `abort` or `record` (abort wins), and the producers' devices when they go.

    `devices` are pairs of a producer's name and a path below /dev or /sys without symbolic links.
    """

    abort: frozenset[str]
    record: frozenset[str]
    devices: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        """Whether any event could count."""
        return bool(self.abort or self.record or self.devices)

    def judge_event(self, event: Uevent) -> Seen | None:
        """What an event means, None where it does not count."""
        if event.synthetic or event.action not in ACTION_TEXT:
            return None
        owners = self._owners_of(event) if event.action in GONE else ()
        if owners or event.subsystem in self.abort:
            return Seen(Severity.abort, event, owners)
        return Seen(Severity.record, event) if event.subsystem in self.record else None

    def missed_events(self, action: str) -> Seen:
        """What events amount to that nobody could read: any of those that count may have been among them."""
        severity = Severity.abort if self.abort or self.devices else Severity.record
        return Seen(severity, Uevent(action, "", ""))

    def _owners_of(self, event: Uevent) -> tuple[str, ...]:
        """Producers that name this device, or one below it, which goes with it."""
        below = f"{event.device}/"
        paths = (event.device, event.node)
        return tuple(sorted({name for name, path in self.devices if path in paths or path.startswith(below)}))


class Netlink:
    """The kernel's uevents from now on; OSError where there is no such socket to be had (a sandbox, a limit)."""

    def __init__(self, context: pyudev.Context) -> None:
        # The kernel's messages, not udev's: udevd sends its own after the rules have run, which takes as long as they
        # take, and it may be the one that is stopped. Nothing that udev adds to an event is needed here. A filter
        # would save nothing: libudev's runs in the kernel for udev's messages alone.
        try:
            self._monitor = pyudev.Monitor.from_netlink(context, source="kernel")
        except OSError as error:
            number = ctypes.get_errno()  # libudev's, which pyudev leaves out
            raise OSError(number, os.strerror(number)) from error
        self._socket = socket.fromfd(self._monitor.fileno(), socket.AF_NETLINK, socket.SOCK_RAW)
        try:
            self._resize_buffer(QUEUE_BYTES)
            self._monitor.start()
        except OSError:
            self._socket.close()
            raise

    def _resize_buffer(self, size: int) -> None:
        # Not by pyudev, which up to 0.24.4 takes libudev's 1 for an error. Without CAP_NET_ADMIN the limit is
        # net.core.rmem_max; a queue that is too short is noticed (LOST).
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def fileno(self) -> int:
        """The descriptor that is readable when something is there, an overflow included."""
        return self._socket.fileno()

    def receive_event(self) -> Uevent | None:
        """Next message, None where there is none yet.

        OSError (ENOBUFS) after an overflow, once; MemoryError likewise loses a message. ValueError for one that
        libudev does not understand or that is no UTF-8.
        """
        # An overflow leaves an error at the socket, and pyudev's poll() raises for it without taking it away: it would
        # raise for ever, and the loop spin. To read SO_ERROR takes it away.
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
        """Hear nothing any more."""
        self._socket.close()
        del self._monitor  # pyudev's way to close its descriptor


class Guard:
    """Watches between start() and stop(), from the event loop; `happened` is called in it with each event that counts.

    `happened` may stop the guard: nothing is told after that.
    """

    def __init__(self, happened: Callable[[Seen], None]) -> None:
        self._happened = happened
        self._watch = Watch(frozenset(), frozenset())
        self._context = pyudev.Context()  # looks for libudev with a child process: once, not in start()
        self._netlink: Netlink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watching(self) -> bool:
        """Whether it listens now."""
        return self._netlink is not None

    def start(self, abort: Iterable[str], record: Iterable[str], devices: Mapping[str, Iterable[str]]) -> None:
        """Listen from now on; where it does already, only what counts is new.

        `abort` and `record` are names of kernel subsystems (pci, cpu, memory, block, net, ...). `devices` are
        the producers' by their names, as paths below /dev or /sys; symbolic links are followed now, as they
        go with the device. Where nothing could count, nothing is opened. Takes 0.2 to 0.4 ms.
        Failed where the kernel's events cannot be had.
        """
        found = tuple((name, os.path.realpath(path)) for name, paths in devices.items() for path in paths)
        self._watch = Watch(frozenset(abort), frozenset(record), found)
        if self._netlink is not None or not self._watch:
            return
        loop = asyncio.get_running_loop()
        try:
            self._netlink = Netlink(self._context)
        except OSError as error:
            raise Failed(
                f"Device events cannot be watched: {errno_text(error)}",
                where="AF_NETLINK",
                remedy="Let khod have such sockets (RestrictAddressFamilies=), or give the guard nothing to watch for.",
            ) from error
        self._loop = loop
        self._loop.add_reader(self._netlink.fileno(), self.process_pending)

    def stop(self) -> None:
        """Listen no more; what was not read yet is forgotten."""
        if self._netlink is None or self._loop is None:
            return
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()
        self._netlink = self._loop = None

    def process_pending(self) -> None:
        """Tell of what has come, BATCH events at most: called by the loop, and before a step that has no undo."""
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
