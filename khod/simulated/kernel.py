# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated kernel: v3's KHO, exactly, in a directory, with faults to switch on.

It implements the calls of the running kernel (`khod.abi.calls.Calls`), so the v3 code and all above it run on it
unchanged. Its files are below a root, and its state survives the process, as a kernel outlives a daemon: khod can be
killed and started again, and a second `SimulatedKernel` on the same root acts as an operator's `echo 1` behind khod's
back. After its kexec the root shows the second kernel.
"""

import errno
import gzip
import json
import os
import re
import struct
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libfdt

from khod.abi.calls import KMSG, HostCalls, Log
from khod.abi.fdt import KHO_MEM, decode_mem, parse_tree
from khod.abi.kexec_file_load import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.abi.liveupdate import LIVEUPDATE
from khod.abi.proc import BOOT_ID, CMDLINE, read_cmdline
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.kernel.sysfs import IN_DT, KHO

STATE = ".simulated-kernel.json"
LOG = "/var/log/kernel"
COMMAND_LINE_SIZE = 2048  # x86
SCRATCH = (0x1_0000_0000, 0x2000_0000)
KSTRTOULL = re.compile(r"\+?(0[xX](?P<hex>[0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*))\n?")  # base 0
DT_MAX = 0xA0_0000
RELEASE = "6.8.0-kho-v3-simulated"


class Rebooted(BaseException):
    """The simulated reboot(2) did not return: this process ended with its kernel.

    It is not an Exception, so that handlers for a failed call do not catch it.
    """


@dataclass
class KernelState:
    """The state of a kernel that no file shows."""

    image: dict[str, Any] | None = None
    faults: dict[str, Any] = field(default_factory=dict)
    ranges: int = 4
    leaked: int = 0
    log_start: int = 0
    """Where this boot's log begins, in bytes."""


class SimulatedKernel(HostCalls):
    """The kernel in the directory `root`, which is created with a fresh boot if it is new.

    Faults (`set_fault(name, value)`, kept until set to None): `veto`, `serialize_errno` (the kernel's own
    reason, a positive errno), `slow_serialize` and `slow_abort` (seconds), `abort_errno`, `load_errno`,
    `unload_errno`, `reboot_errno`, `malformed_tree`, `cold` (the next jump is a plain reset), `lose`
    (the tree does not arrive), `change` (it arrives changed).

    One class of this size: it is one kernel, with a method for each file and call that the real one has.
    """

    def __init__(self, root: Path, *, ranges: int = 4) -> None:
        super().__init__(root)
        if (root / STATE).exists():
            self._state = KernelState(**json.loads((root / STATE).read_text()))
        else:
            self._state = KernelState(ranges=ranges)
            self._boot_kernel("root=/dev/sim rw kho_scratch=512M")

    def set_fault(self, name: str, value: object) -> None:
        """Switch a fault on, or off with None."""
        self._refresh_state()
        if value is None:
            self._state.faults.pop(name, None)
        else:
            self._state.faults[name] = value
        self._save_state()

    def echo_to(self, path: str, text: str) -> None:
        """Write to a file as an operator's `echo` does, without khod."""
        self.write_file(path, text.encode() + b"\n")

    @property
    def kernel_log(self) -> str:
        """The kernel log of all boots."""
        return self.host_path(LOG).read_text()

    @property
    def leaked_bytes(self) -> int:
        """Bytes of kernel memory lost to failed activations (each leaks dt_max bytes)."""
        return self._state.leaked

    # The calls

    def write_file(self, path: str, data: bytes) -> None:
        self._refresh_state()
        if path == KMSG:
            self._printk(data.decode().strip())
            return
        handlers = {f"{KHO}/active": self._write_active, f"{KHO}/dt_max": self._write_dt_max}
        if path not in handlers:
            super().write_file(path, data)
            return
        if number := handlers[path](data):
            raise OSError(number, os.strerror(number), f"write {data.decode(errors='replace').strip()!r} to {path}")

    def open_log(self, *, whole: bool = False) -> Log:
        self._refresh_state()
        return _WholeLog(self.host_path(LOG), self._state.log_start) if whole else _Log(self.host_path(LOG))

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        self._refresh_state()
        if number := self._load_image(kernel_fd, initrd_fd, cmdline, flags):
            raise OSError(number, os.strerror(number), f"kexec_file_load({kernel_fd}, {initrd_fd}, flags={flags:#x})")

    def reboot_kexec(self) -> None:
        self._refresh_state()
        image, faults = self._state.image, self._state.faults
        number = errno.EINVAL if image is None else faults.get("reboot_errno", 0)
        if number or image is None:
            raise OSError(number, os.strerror(number), "reboot(LINUX_REBOOT_CMD_KEXEC)")
        if faults.pop("cold", None):
            self._boot_kernel(read_cmdline(self))
            raise Rebooted
        tree = None if image["tree"] is None or faults.get("lose") else bytes.fromhex(image["tree"])
        if tree is not None and faults.get("change"):
            tree = tree.replace(b"global-trace", b"GLOBAL-TRACE")
        self._boot_kernel(image["cmdline"], tree, image["release"])
        raise Rebooted

    def create_session(self, name: str) -> int:
        raise OSError(errno.ENOENT, f"no LUO, which came years after v3, for {name}", f"open {LIVEUPDATE}")

    def retrieve_session(self, name: str) -> int:
        return self.create_session(name)

    def sync_disks(self) -> None:
        """Do nothing: the simulated kernel's disks are the host's own."""

    def freeze_filesystem(self, path: str) -> None:
        """Do nothing, as sync_disks does."""

    def thaw_filesystem(self, path: str) -> None:
        """Do nothing, as sync_disks does."""

    # v3's active phase, in the kernel's order of errnos

    def _write_active(self, data: bytes) -> int:
        wanted = _kstrtobool(data)
        if wanted is None:
            return errno.EINVAL
        if not SCRATCH[1] or int(self.read_file(f"{KHO}/scratch_len"), 16) == 0:
            return errno.ENOMEM  # also for a 0
        if wanted == (self.read_file(f"{KHO}/active").strip() == b"1"):
            return 0
        return self._serialize_tree() if wanted else self._abort_active()

    def _serialize_tree(self) -> int:
        faults = self._state.faults
        time.sleep(faults.get("slow_serialize", 0))
        dt_max = int(self.read_file(f"{KHO}/dt_max"), 16)
        tree = build_tree(self._state.ranges)
        cause = 1 if faults.get("veto") else faults.get("serialize_errno", 3 if len(tree) > dt_max else 0)
        if cause:
            self._state.leaked += dt_max
            self._save_state()
            self._printk(f"kho failed to serialize state: {-cause}")
            return errno.EINVAL
        if faults.get("malformed_tree"):
            tree = tree[: len(tree) // 2]
        self._set_file(f"{KHO}/dt", tree, 0o400)
        self._set_file(f"{KHO}/active", b"1\n", 0o600)
        return 0

    def _abort_active(self) -> int:
        faults = self._state.faults
        time.sleep(faults.get("slow_abort", 0))
        if number := faults.get("abort_errno", 0):
            return int(number)
        self.host_path(f"{KHO}/dt").unlink()
        self._set_file(f"{KHO}/active", b"0\n", 0o600)
        return 0  # and a loaded image keeps the tree it was loaded with

    def _write_dt_max(self, data: bytes) -> int:
        if not (found := KSTRTOULL.fullmatch(data.decode(errors="replace"))):
            return errno.EINVAL
        value = (
            int(found["hex"], 16)
            if found["hex"]
            else int(found["octal"] or found["decimal"], 8 if found["octal"] else 10)
        )
        self._set_file(f"{KHO}/dt_max", f"{value:#x}\n".encode(), 0o600)
        return 0

    # The loader

    def _load_image(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> int:
        if self.read_file(LOAD_DISABLED).strip() != b"0" or not self._is_permitted():
            return errno.EPERM  # before the flags are checked, so an unload is refused too
        if flags & KEXEC_FILE_UNLOAD:
            if number := self._state.faults.get("unload_errno", 0):
                return int(number)
            self._keep_image(None)
            return 0
        if number := self._state.faults.get("load_errno", 0):
            return int(number)
        kernel = _read_fd(kernel_fd)
        initrd = b"" if flags & KEXEC_FILE_NO_INITRAMFS else _read_fd(initrd_fd)
        if not kernel or not cmdline.endswith(b"\0") or len(cmdline) > COMMAND_LINE_SIZE:
            return errno.EINVAL
        if kernel[0x1FE:0x206] != b"\x55\xaa" + kernel[0x200:0x202] + b"HdrS":
            return errno.ENOEXEC
        tree = self.read_file(f"{KHO}/dt") if self.read_file(f"{KHO}/active").strip() == b"1" else None
        scratch_start, scratch_size = (int(self.read_file(f"{KHO}/scratch_{what}"), 16) for what in ("phys", "len"))
        if tree is not None:
            for _path, node in parse_tree(tree).walk():
                for region in decode_mem(node):
                    if region.addr < scratch_start + scratch_size and scratch_start < region.addr + region.size:
                        return errno.EINVAL
            if len(kernel) + len(initrd) + len(tree) > scratch_size:
                return errno.EADDRNOTAVAIL
        tree_text = None if tree is None else tree.hex()
        self._keep_image({"cmdline": cmdline[:-1].decode(), "tree": tree_text, "release": _release_of(kernel)})
        return 0

    def _is_permitted(self) -> bool:
        left = int(self.read_file(LOAD_LIMIT))
        if left > 0:
            self._set_file(LOAD_LIMIT, f"{left - 1}\n".encode())
        return left != 0

    # Boot and state

    def _boot_kernel(self, cmdline: str, tree: bytes | None = None, release: str = RELEASE) -> None:
        log = self.host_path(LOG)
        self._state.log_start = log.stat().st_size if log.exists() else 0
        self._keep_image(None)
        for path in (f"{KHO}/dt", IN_DT):
            self.host_path(path).unlink(missing_ok=True)
        self._set_file(BOOT_ID, f"{uuid.uuid4()}\n".encode())
        self._set_file("/proc/sys/kernel/osrelease", f"{release}\n".encode())
        self._set_file(CMDLINE, cmdline.encode() + b"\n")
        self._set_file(LOAD_DISABLED, b"0\n")
        self._set_file(LOAD_LIMIT, b"-1\n")
        self._set_file(f"{KHO}/active", b"0\n", 0o600)
        self._set_file(f"{KHO}/dt_max", f"{DT_MAX:#x}\n".encode(), 0o600)
        self._set_file(f"{KHO}/scratch_phys", f"{SCRATCH[0]:#x}\n".encode(), 0o400)
        self._set_file(f"{KHO}/scratch_len", f"{SCRATCH[1]:#x}\n".encode(), 0o400)
        if tree is not None:
            self._set_file(IN_DT, tree, 0o400)
            self._printk("KHO: found kexec handover data.")
        self._printk(f"Command line: {cmdline}")

    def _keep_image(self, image: dict[str, Any] | None) -> None:
        self._state.image = image
        self._set_file("/sys/kernel/kexec_loaded", b"0\n" if image is None else b"1\n", 0o444)
        self._save_state()

    def _set_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        at = self.host_path(path)
        at.parent.mkdir(parents=True, exist_ok=True)
        new = self.root / f"{STATE}.attribute"
        new.unlink(missing_ok=True)
        new.write_bytes(data)
        new.chmod(mode)
        new.rename(at)  # in one piece, as the kernel changes an attribute

    def _printk(self, line: str) -> None:
        self.host_path(LOG).parent.mkdir(parents=True, exist_ok=True)
        with self.host_path(LOG).open("a") as log:
            log.write(line + "\n")

    def _save_state(self) -> None:
        new = self.root / f"{STATE}.new"
        new.write_text(json.dumps(vars(self._state)))
        new.rename(self.root / STATE)

    def _refresh_state(self) -> None:
        """Read the state again, which another process may have changed."""
        self._state = KernelState(**json.loads((self.root / STATE).read_text()))


class _Log:
    """The log from its end on, in the record format of /dev/kmsg, as the kernel's own at level err."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._file.seek(0, os.SEEK_END)

    def read(self, _size: int, /) -> bytes:
        line = self._file.readline()
        return b"3,0,0,-;" + line if line else b""

    def close(self) -> None:
        self._file.close()


class _WholeLog:
    """This boot's log from its first record, as the kernel's own at level info.

    A line that begins with `<N>` is a process's at that level, one with SOH and a digit the kernel's.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._sequence = 0

    def read(self, _size: int, /) -> bytes:
        if not (line := self._file.readline()):
            return b""
        priority = b"6"
        if found := re.match(rb"<(\d)>", line):
            priority, line = b"%d" % (8 + int(found[1])), line[found.end() :]
        elif line[:1] == b"\1":
            priority, line = line[1:2], line[2:]
        self._sequence += 1
        return b"%b,%d,0,-;%b" % (priority, self._sequence - 1, line)

    def close(self) -> None:
        self._file.close()


def _kstrtobool(data: bytes) -> bool | None:
    """Parse as lib/kstrtox.c does: the first character decides, or the second of `on` and `off`."""
    first = data[:1].lower()
    if first == b"o":
        return {b"n": True, b"f": False}.get(data[1:2].lower())
    return {b"1": True, b"y": True, b"t": True, b"0": False, b"n": False, b"f": False}.get(first)


def _release_of(kernel: bytes) -> str:
    """Return the release in the header of a bzImage, this kernel's own if it has none there."""
    at = int.from_bytes(kernel[0x20E:0x210], "little")
    found = kernel[0x200 + at :].split(b"\0")[0].split(b" ")[0].decode(errors="replace") if at else ""
    return found or RELEASE


def _read_fd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def build_tree(ranges: int) -> bytes:
    """Build a v3 tree as its ftrace producer does: one trace array, one CPU, `ranges` kho_mem entries."""
    fdt = libfdt.FdtSw()
    fdt.finish_reservemap()
    fdt.begin_node("")
    fdt.property_string("compatible", "kho-v1")
    fdt.begin_node("ftrace")
    fdt.property_string("compatible", "ftrace-v1")
    fdt.property("events", struct.pack("=II", 0x1234ABCD, 1))
    fdt.begin_node("global-trace")
    fdt.property_string("compatible", "ftrace,array-v1")
    fdt.property("trace-flags", struct.pack("=I", 0x41))
    fdt.begin_node("cpu0")
    fdt.property_string("compatible", "ftrace,cpu-v1")
    fdt.property("cpu", struct.pack("=I", 0))
    fdt.property("mem", b"".join(KHO_MEM.pack(0x4000_0000 + page * 0x2000, 0x1000) for page in range(ranges)))
    for _node in range(4):
        fdt.end_node()
    made = fdt.as_fdt()
    return bytes(made.as_bytearray()[: made.totalsize()])


def build_image() -> bytes:
    """Build a small file that this kernel's loader accepts: a bzImage of strings, which says it has v3's KHO too."""
    words = (f"Linux version {RELEASE} (sim) #1", "dt_max", "kho-v1", "ftrace-v1", "ftrace,array-v1")
    payload = gzip.compress(b"\0".join(word.encode() for word in ("", *words, "ftrace,cpu-v1", "")), mtime=0)
    made = bytearray(0x400 + -(-len(payload) // 16) * 16)
    made[0x1F1] = 1  # setup_sects
    struct.pack_into("<I", made, 0x1F4, -(-len(payload) // 16))  # syssize, in paragraphs
    made[0x1FE:0x200] = b"\x55\xaa"
    made[0x202:0x206] = b"HdrS"
    struct.pack_into("<HII", made, 0x206, 0x20F, 0, 0)
    made[0x211] = 1  # loadflags: LOADED_HIGH
    struct.pack_into(
        "<I2xHI", made, 0x230, 2 << 20, 3, COMMAND_LINE_SIZE - 1
    )  # alignment, xloadflags: 64 bits, above 4G
    struct.pack_into("<II", made, 0x248, 0, len(payload))
    struct.pack_into("<I", made, 0x260, 1 << 20)  # init_size
    made[0x400 : 0x400 + len(payload)] = payload
    return bytes(made)


def build_initrd() -> bytes:
    """Build the smallest initramfs with something to start: an empty /init."""
    made = b""
    for name, mode in (("init", 0o100755), ("TRAILER!!!", 0)):
        fields = (0, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, len(name) + 1, 0)
        made += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        made += bytes(-len(made) % 4)
    return made


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes({"image": build_image, "initrd": build_initrd}[sys.argv[1]]())
