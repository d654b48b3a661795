# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard on the kernel's own netlink socket.

Whoever has CAP_SYS_ADMIN over a network namespace may send a uevent into it (uevent_net_rcv_skb in
lib/kobject_uevent.c), and to listeners it comes from the kernel. So the events here are the tests' own, go
through the kernel, libudev and pyudev, and reach nobody outside a namespace made for the test. It takes root.
"""

import asyncio
import ctypes
import errno
import gc
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pyudev
from hypothesis import given
from hypothesis import strategies as st

from khod import config
from khod.engine import guard
from khod.engine.guard import LOST, UNREADABLE, Guard, Netlink, Seen, Severity, Uevent, Watch
from khod.errors import Failed

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
NETLINK_KOBJECT_UEVENT = 15  # include/uapi/linux/netlink.h
MESSAGE = 16  # the first type that is not netlink's own
REQUEST_ACK = 1 | 4  # NLM_F_REQUEST | NLM_F_ACK
CAP_NET_ADMIN = 1 << 12  # include/uapi/linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)

PCI = "/devices/pci0000:00/0000:00:05.0"
DISK = f"{PCI}/virtio3/block/vdz"
OURS = "khod-test"  # a subsystem no kernel has, so that only what a test sends counts
MARK = Uevent("add", OURS, "/sys/devices/mark")


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: run the tests as root")


@contextmanager
def namespace() -> Iterator[None]:
    """A network namespace for this thread."""
    with Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").open("rb") as before:
        must(LIBC.unshare(CLONE_NEWNET))
        try:
            yield
        finally:
            must(LIBC.setns(before.fileno(), CLONE_NEWNET))


@pytest.fixture
def alone() -> Iterator[None]:
    with namespace():
        yield


def send(message: bytes) -> None:
    """Have the kernel broadcast these bytes as a uevent; it is queued at every listener when this returns."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as kernel:
        kernel.settimeout(5)
        kernel.sendto(struct.pack("=IHHII", 16 + len(message), MESSAGE, REQUEST_ACK, 1, 0) + message, (0, 0))
        answer = struct.unpack_from("=i", kernel.recv(4096), 16)[0]
    # ENOBUFS says that a listener's queue was full, which one test wants.
    assert -answer in (0, errno.ENOBUFS), os.strerror(-answer)


def uevent(action: str, path: str, subsystem: str, **more: str) -> bytes:
    """A message as kobject_uevent_env() words it."""
    fields = {"ACTION": action, "DEVPATH": path, "SUBSYSTEM": subsystem, **more}
    return b"".join(f"{word}\0".encode() for word in (f"{action}@{path}", *(f"{k}={v}" for k, v in fields.items())))


MARKER = uevent("add", "/devices/mark", OURS)


class Witness:
    """Keeps what a guard tells, and what went wrong in the loop."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.wrong: list[object] = []
        self._marked = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: self.wrong.append(context))

    def __call__(self, seen: Seen) -> None:
        if seen.event == MARK:
            self._marked.set()
        else:
            self.seen.append(seen)

    async def after(self, *messages: bytes) -> list[Seen]:
        """Send these and a mark that counts; what was told before the mark."""
        for message in (*messages, MARKER):
            send(message)
        await self._marked.wait()
        self._marked.clear()
        assert not self.wrong
        return self.seen


@contextmanager
def watching(witness: Callable[[Seen], None], *abort: str, **devices: tuple[str, ...]) -> Iterator[Guard]:
    """A guard that notes OURS and aborts for `abort` and for the producers' `devices`."""
    watch = Guard(witness)
    watch.start(abort, [OURS], devices)
    try:
        yield watch
    finally:
        watch.stop()


def descriptors() -> set[str]:
    """What this process has open, but for the directory this is read from, and for what earlier tests have left."""
    gc.collect()
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return {f"{link.name}: {link.readlink()}" for link in links if os.path.lexists(link)}


# -- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Uevent("add", "pci", "/sys/devices/pci0000:00/0000:00:05.0"), "pci device 0000:00:05.0 was added"),
        (Uevent("remove", "block", "/sys/block/sdb", "/dev/sdb"), "block device sdb (/dev/sdb) was removed"),
        (Uevent("offline", "cpu", "/sys/devices/system/cpu/cpu1"), "cpu device cpu1 went offline"),
        (Uevent("online", "memory", "/sys/devices/system/memory/memory32"), "memory device memory32 came online"),
    ],
)
def test_an_event_of_a_subsystem_that_counts(event: Uevent, sentence: str) -> None:
    abort, record = Watch(frozenset({event.subsystem}), frozenset()), Watch(frozenset(), frozenset({event.subsystem}))
    assert abort.judge_event(event) == Seen(Severity.abort, event)
    assert record.judge_event(event) == Seen(Severity.record, event)
    assert Seen(Severity.abort, event).describe() == sentence


@pytest.mark.parametrize("action", ["change", "move", "bind", "unbind", ""])
def test_what_says_something_of_a_device_that_stays_does_not_count(action: str) -> None:
    watch = Watch(frozenset({"pci"}), frozenset({"pci"}), (("vm1", "/sys/devices/a"),))
    assert watch.judge_event(Uevent(action, "pci", "/sys/devices/a")) is None


def test_an_event_somebody_wrote_does_not_count() -> None:
    watch = Watch(frozenset({"pci"}), frozenset(), (("vm1", "/sys/devices/a"),))
    assert watch.judge_event(Uevent("remove", "pci", "/sys/devices/a", synthetic=True)) is None


def test_other_subsystems_do_not_count() -> None:
    assert Watch(frozenset({"pci"}), frozenset({"net"})).judge_event(Uevent("add", "block", "/sys/block/sdb")) is None


@pytest.mark.parametrize(
    ("subsystem", "device", "node"),
    [
        ("vfio", "/sys/devices/virtual/vfio/12", "/dev/vfio/12"),
        ("vfio-dev", "/sys/devices/pci0000:80/0000:81:00.0/vfio-dev/vfio0", "/dev/vfio/devices/vfio0"),
    ],
    ids=["group", "cdev"],
)
@pytest.mark.parametrize("action", ["add", "remove"])
def test_vfio_devices_count_by_default_by_group_and_by_cdev(
    action: str, subsystem: str, device: str, node: str
) -> None:
    """openvmm#3465, kubevirt#18300: without CONFIG_VFIO_GROUP there is only vfio-dev (drivers/vfio/vfio_main.c)."""
    defaults = config.GuardSettings()
    watch = Watch(frozenset(defaults.abort), frozenset(defaults.record))
    seen = watch.judge_event(Uevent(action, subsystem, device, node))
    assert seen is not None
    assert seen.severity is Severity.abort


def test_abort_wins_over_record() -> None:
    seen = Watch(frozenset({"pci"}), frozenset({"pci"})).judge_event(Uevent("add", "pci", "/sys/devices/a"))
    assert seen is not None
    assert seen.severity is Severity.abort


@pytest.mark.parametrize(
    "path",
    ["/dev/vdz", f"/sys{DISK}", f"/sys{DISK}/vdz1"],
    ids=["its node", "itself", "what is below it"],
)
@pytest.mark.parametrize("action", ["remove", "offline"])
def test_a_producers_device_that_goes_aborts_whatever_its_subsystem(path: str, action: str) -> None:
    watch = Watch(frozenset(), frozenset(), (("vm1", path), ("other", "/dev/vdzz"), ("another", f"/sys{DISK}2")))
    event = Uevent(action, "block", f"/sys{DISK}", "/dev/vdz")
    assert watch.judge_event(event) == Seen(Severity.abort, event, ("vm1",))
    assert watch.judge_event(Uevent("add", "block", f"/sys{DISK}", "/dev/vdz")) is None


def test_a_device_of_several_producers_names_them_all() -> None:
    watch = Watch(frozenset(), frozenset(), (("vm2", f"/sys{DISK}"), ("vm1", "/dev/vdz"), ("vm1", f"/sys{DISK}")))
    seen = watch.judge_event(Uevent("remove", "block", f"/sys{DISK}", "/dev/vdz"))
    assert seen is not None
    assert seen.describe() == "block device vdz (/dev/vdz) of producers vm1, vm2 was removed"


@pytest.mark.parametrize("action", [LOST, UNREADABLE])
def test_events_nobody_read_count_as_the_worst_that_is_watched_for(action: str) -> None:
    nothing: frozenset[str] = frozenset()
    some = frozenset({"pci"})
    assert Watch(some, nothing).missed_events(action).severity is Severity.abort
    assert Watch(nothing, some).missed_events(action).severity is Severity.record
    assert Watch(nothing, some, (("vm1", "/dev/vdz"),)).missed_events(action).severity is Severity.abort


# -- from the kernel -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
async def test_events_come_as_the_kernel_sent_them() -> None:
    witness = Witness()
    with watching(witness, "pci", vm1=("/dev/vdz",)):
        seen = await witness.after(
            uevent("add", PCI, "pci", PCI_SLOT_NAME="0000:00:05.0"),
            uevent("bind", PCI, "pci"),
            uevent("add", PCI, "pci", SYNTH_UUID="0"),
            uevent("add", DISK, "block", DEVNAME="vdz", MAJOR="254", MINOR="240"),
            uevent("remove", DISK, "block", DEVNAME="vdz", MAJOR="254", MINOR="240"),
        )
    assert seen == [
        Seen(Severity.abort, Uevent("add", "pci", f"/sys{PCI}")),
        Seen(Severity.abort, Uevent("remove", "block", f"/sys{DISK}", "/dev/vdz"), ("vm1",)),
    ]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("refused", [False, True])
async def test_a_link_is_followed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """It is gone when the device is, as those of udev in /dev/disk and the kernel's in /sys/class are.

    AppArmor refuses lstat(2) where khod has no right to read.
    """
    link = tmp_path / "by-id"
    link.symlink_to("/dev/vdz")
    lstat = os.lstat

    def refuse(path: str, **options: Any) -> os.stat_result:
        if refused and path == str(link):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", refuse)
    witness = Witness()
    with watching(witness, vm1=(str(link),)):
        link.unlink()
        seen = await witness.after(uevent("remove", DISK, "block", DEVNAME="vdz", MAJOR="254", MINOR="240"))
    assert [one.producers for one in seen] == [("vm1",)]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("target", ["../../vdz", "/dev/vdz", "../by-path/0", "/dev/disk/by-path/0"])
@pytest.mark.parametrize("bound", [True, False])
async def test_a_link_is_followed_where_the_unit_shows_the_host_s_dev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, bound: bool
) -> None:
    """Links of the host's /dev mean the host's; an empty directory at the place is no /dev."""
    devices, bound_devices = tmp_path / "dev", tmp_path / "bound"
    shown = bound_devices if bound else devices
    for name in ("dev", "bound", f"{shown.name}/disk/by-id", f"{shown.name}/disk/by-path"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    if bound:
        (bound_devices / "null").touch()
    (shown / "disk/by-id/x").symlink_to(target.replace("/dev", str(devices)))
    (shown / "disk/by-path/0").symlink_to("../../vdz")
    monkeypatch.setattr(guard, "DEVICES", str(devices))
    monkeypatch.setattr(guard, "BOUND_DEVICES", str(bound_devices))
    assert guard._resolve_device(f"{devices}/disk/by-id/x") == f"{devices}/vdz"
    assert guard._resolve_device("/sys/class/none") == "/sys/class/none"


@pytest.mark.usefixtures("alone")
async def test_another_start_brings_new_devices_and_forgets_no_event() -> None:
    witness = Witness()
    with watching(witness, "pci", vm1=("/dev/vdz",)) as watch:
        send(uevent("add", PCI, "pci"))
        watch.start(["pci"], [OURS], {"vm2": (f"/sys{DISK}",)})
        seen = await witness.after(uevent("remove", DISK, "block", DEVNAME="vdz", MAJOR="254", MINOR="240"))
    assert [(one.event.subsystem, one.producers) for one in seen] == [("pci", ()), ("block", ("vm2",))]


@pytest.mark.usefixtures("alone")
async def test_events_from_before_and_from_after_are_none_of_its_business() -> None:
    witness = Witness()
    with watching(Witness(), "pci"):  # somebody else's socket is no reason to hear of it
        send(uevent("add", PCI, "pci"))
        with watching(witness, "pci") as watch:
            assert await witness.after() == []
            watch.stop()
            send(uevent("remove", PCI, "pci"))
            watch.start(["pci"], [OURS], {})
            assert await witness.after() == []


@pytest.mark.usefixtures("alone")
async def test_look_tells_at_once_what_has_come() -> None:
    witness = Witness()
    with watching(witness, "pci") as watch:
        send(uevent("add", PCI, "pci"))
        watch.process_pending()
        assert [one.describe() for one in witness.seen] == ["pci device 0000:00:05.0 was added"]


@pytest.mark.usefixtures("alone")
async def test_nothing_is_told_once_it_was_stopped_by_what_happened() -> None:
    seen: list[Seen] = []

    def happened(one: Seen) -> None:
        seen.append(one)
        watch.stop()

    with watching(happened, "pci") as watch:
        send(uevent("add", PCI, "pci"))
        send(uevent("remove", PCI, "pci"))
        watch.process_pending()
    assert [one.event.action for one in seen] == ["add"]


@pytest.mark.usefixtures("alone")
async def test_start_and_stop_leave_nothing_open_however_often() -> None:
    watch = Guard(Witness())
    before = descriptors()
    for _ in range(3):
        watch.start(["pci"], [], {})
        watch.start(["pci"], [], {})
        assert watch.watching
        assert len(descriptors() - before) == 2  # libudev's and ours, for one socket
        watch.stop()
        watch.stop()
        assert not watch.watching
        assert descriptors() == before


async def test_with_nothing_to_watch_for_nothing_is_opened() -> None:
    watch, before = Guard(Witness()), descriptors()
    watch.start([], [], {})
    assert not watch.watching
    assert descriptors() == before
    watch.stop()


@pytest.mark.parametrize("room", [0, 1], ids=["none", "libudev's alone"])
async def test_without_a_socket_it_says_so(room: int) -> None:
    watch, before = Guard(Witness()), descriptors()
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, hard))
    try:
        with pytest.raises(Failed, match=r"Device events cannot be watched: EMFILE") as caught:
            watch.start(["pci"], [], {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.where == "AF_NETLINK"
    assert not watch.watching
    del caught  # it holds on to the stack of the call that failed
    assert descriptors() == before
    watch.start(["pci"], [], {})
    assert watch.watching
    watch.stop()


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
async def test_an_overflow_is_told_once_and_what_comes_later_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "QUEUE_BYTES", 1)  # the kernel makes 2304 of it: two events or three
    witness = Witness()
    with watching(witness, "pci") as watch:
        for _ in range(50):
            send(uevent("add", PCI, "pci"))
        watch.process_pending()
        first, *rest = witness.seen
        assert first == Seen(Severity.abort, Uevent(LOST, "", ""))
        assert first.describe() == "the kernel sent more device events than could be read: some were lost"
        assert 0 < len(rest) < 50
        assert {one.event.action for one in rest} == {"add"}
        del witness.seen[:]
        assert await witness.after() == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "message",
    [
        uevent("add", PCI, "pci").replace(b"SUBSYSTEM=pci\0", b""),
        uevent("add", PCI, "pci").replace(b"ACTION=add\0", b""),
        uevent("add", "/devices/X", "pci").replace(b"X", b"\xff"),
        uevent("explode", PCI, "pci"),
        b"add@/devices/a\0",
        b"\0\0\0\0",
        b"garbage",
    ],
    ids=["no subsystem", "no action", "no UTF-8", "unknown action", "no fields", "zeros", "garbage"],
)
async def test_garbage_is_told_and_stops_nothing(message: bytes) -> None:
    witness = Witness()
    with watching(witness, "pci"):
        seen = await witness.after(message)
    assert seen == [Seen(Severity.abort, Uevent(UNREADABLE, "", ""))]
    assert seen[0].describe() == "a device event could not be read"


@given(st.binary(min_size=1, max_size=500))
def test_no_message_does_more_than_raise_what_receive_promises(message: bytes) -> None:
    context = pyudev.Context()
    with namespace():
        netlink = Netlink(context)
        try:
            send(message)
            netlink.receive_event()
        except ValueError:
            pass
        finally:
            netlink.close()


@pytest.mark.usefixtures("alone")
async def test_it_listens_without_the_right_to_a_long_queue() -> None:
    witness = Witness()
    with without_net_admin(), watching(witness, "pci"):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as one, pytest.raises(PermissionError):
            one.setsockopt(socket.SOL_SOCKET, guard.SO_RCVBUFFORCE, guard.QUEUE_BYTES)
        seen = await witness.after(uevent("add", PCI, "pci"))
    assert len(seen) == 1


@contextmanager
def without_net_admin() -> Iterator[None]:
    """Take CAP_NET_ADMIN from this thread's effective set; it stays in the permitted one."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    before = ctypes.create_string_buffer(24)
    must(LIBC.capget(header, before))
    effective, *others = struct.unpack("=6I", before.raw)
    must(LIBC.capset(header, struct.pack("=6I", effective & ~CAP_NET_ADMIN, *others)))
    try:
        yield
    finally:
        must(LIBC.capset(header, before))
