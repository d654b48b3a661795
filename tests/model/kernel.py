# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel in memory: what `khod.simulated.kernel` does with files, and LUO; one for all khods of the modelled host.

Its methods are also what an operator's `echo` or kexec-tools do to it. `test_kernel.py` holds it to the simulated one.
"""

import errno
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from khod.abi.calls import KMSG
from khod.abi.fdt import decode_mem, parse_tree
from khod.abi.kexec_file_load import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.abi.liveupdate import LIVEUPDATE
from khod.abi.proc import BOOT_ID
from khod.kernel import debugfs
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.kernel.sysfs import IN_DT, KHO
from khod.simulated.kernel import COMMAND_LINE_SIZE, DT_MAX, KSTRTOULL, SCRATCH, _kstrtobool, build_tree
from tests.model.luo import MemoryLuo, refuse
from tests.model.process import FIRST_FD, File, file_of

V3, STATELESS, OTHER = "v3", "stateless", "other"
"""What a kernel is: v3's, one that has no active phase, and v3's in another format, which takes nothing over."""

RELEASE = {V3: "6.8.0-kho-v3-simulated", STATELESS: "7.3.4-simulated", OTHER: "6.9.0-kho-v3-simulated"}
CMDLINE = {
    V3: "root=/dev/sim rw kho_scratch=512M liveupdate=on",
    STATELESS: "root=/dev/sim rw kho=on liveupdate=on",
    OTHER: "root=/dev/sim rw",
}
LOADED = {V3: "/sys/kernel/kexec_loaded", STATELESS: "/sys/kernel/kexec/loaded", OTHER: "/sys/kernel/kexec_loaded"}
BLOB = "memblock"

tree_of = functools.cache(build_tree)


@functools.cache
def regions_of(tree: bytes) -> tuple[tuple[int, int], ...]:
    """Address and size of all that a v3 tree keeps."""
    return tuple((region.addr, region.size) for _path, node in parse_tree(tree).walk() for region in decode_mem(node))


class ImageFile(File):
    """A kernel image or an initrd, by what it is."""

    def __init__(self, kind: str, content: bytes) -> None:
        super().__init__()
        self.kind = kind
        self.content = content


@dataclass(frozen=True)
class Image:
    """What was loaded, and by whom; `tree` is v3's copy, None where the kernel was not active."""

    kind: str
    cmdline: str
    tree: bytes | None
    by: str


class MemoryKernel:
    """The kernel that runs. `active_by` and `image.by` say who entered the active phase, and who loaded."""

    def __init__(self, kind: str = V3, boot_ids: Callable[[], str] = lambda: "boot") -> None:
        self.luo = MemoryLuo()
        self.log: list[str] = []
        self.leaked = 0
        self._boot_ids = boot_ids
        self.boot(kind, CMDLINE[kind], None)

    def boot(self, kind: str, cmdline: str, tree: bytes | None) -> None:
        """Start as this kernel, with what arrived; LUO is told by itself."""
        self.kind = kind
        self.image: Image | None = None
        self.active_by = ""
        self.tree = tree_of(4)
        self.files: dict[str, bytes] = {
            BOOT_ID: f"{self._boot_ids()}\n".encode(),
            "/proc/sys/kernel/osrelease": f"{RELEASE[kind]}\n".encode(),
            "/proc/cmdline": cmdline.encode() + b"\n",
            LOAD_DISABLED: b"0\n",
            LOAD_LIMIT: b"-1\n",
            LOADED[kind]: b"0\n",
            LIVEUPDATE: b"",
        }
        scratch_phys, scratch_len = f"{SCRATCH[0]:#x}\n".encode(), f"{SCRATCH[1]:#x}\n".encode()
        if kind == STATELESS:
            out = f"{debugfs.KHO}/out"
            self.files |= {f"{out}/scratch_phys": scratch_phys, f"{out}/scratch_len": scratch_len}
            self.files |= {f"{out}/fdt": self.tree, f"{out}/sub_fdts/{BLOB}": self.tree}
            if tree is not None:
                came = f"{debugfs.KHO}/in"
                self.files |= {f"{came}/fdt": tree, f"{came}/sub_fdts/{BLOB}": tree}
            return
        self.files |= {
            f"{KHO}/active": b"0\n",
            f"{KHO}/dt_max": f"{DT_MAX:#x}\n".encode(),
            f"{KHO}/scratch_phys": scratch_phys,
            f"{KHO}/scratch_len": scratch_len,
        }
        if tree is not None:
            self.files[IN_DT] = tree

    @property
    def boot_id(self) -> str:
        return self.files[BOOT_ID].decode().strip()

    @property
    def cmdline(self) -> str:
        return self.files["/proc/cmdline"].decode().strip()

    @property
    def active(self) -> bool:
        return self.files.get(f"{KHO}/active") == b"1\n"

    @property
    def loaded(self) -> bool:
        return self.image is not None

    # Files

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise refuse(errno.ENOENT, f"read {path}")
        return self.files[path]

    def exists(self, path: str) -> bool:
        return path in self.files or any(name.startswith(f"{path}/") for name in self.files)

    def listdir(self, path: str) -> list[str]:
        below = f"{path}/"
        return sorted({name[len(below) :].partition("/")[0] for name in self.files if name.startswith(below)})

    def write(self, path: str, data: bytes, by: str = "foreign") -> None:
        what = f"write {data.decode(errors='replace').strip()!r} to {path}"
        if path == KMSG:
            self.log.append(data.decode().strip())
        elif path not in self.files:
            raise refuse(errno.ENOENT, what)
        elif path == f"{KHO}/active":
            if number := self._write_active(data, by):
                raise refuse(number, what)
        elif path == f"{KHO}/dt_max":
            if number := self._write_dt_max(data):
                raise refuse(number, what)
        else:
            self.files[path] = data + self.files[path][len(data) :]  # it is written over, not cut off

    def _write_active(self, data: bytes, by: str) -> int:
        wanted = _kstrtobool(data)
        if wanted is None:
            return errno.EINVAL
        if wanted == self.active:
            return 0
        if wanted:
            dt_max = int(self.files[f"{KHO}/dt_max"], 16)
            if len(self.tree) > dt_max:
                self.leaked += dt_max
                return errno.EINVAL
            self.files[f"{KHO}/dt"] = self.tree
            self.files[f"{KHO}/active"] = b"1\n"
            self.active_by = by
            return 0
        del self.files[f"{KHO}/dt"]
        self.files[f"{KHO}/active"] = b"0\n"
        self.active_by = ""
        return 0  # and a loaded image keeps the tree it was loaded with

    def _write_dt_max(self, data: bytes) -> int:
        if not (found := KSTRTOULL.fullmatch(data.decode(errors="replace"))):
            return errno.EINVAL
        octal = found["octal"]
        value = int(found["hex"], 16) if found["hex"] else int(octal or found["decimal"], 8 if octal else 10)
        self.files[f"{KHO}/dt_max"] = f"{value:#x}\n".encode()
        return 0

    # The loader

    def load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int, by: str = "foreign") -> None:
        if number := self._load(kernel_fd, initrd_fd, cmdline, flags, by):
            raise refuse(number, f"kexec_file_load({kernel_fd}, {initrd_fd}, flags={flags:#x})")

    def _load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int, by: str) -> int:
        if self.files[LOAD_DISABLED].strip() != b"0" or not self._permitted():
            return errno.EPERM
        if flags & KEXEC_FILE_UNLOAD:
            self.keep(None)
            return 0
        kernel = _contents(kernel_fd)
        initrd = b"" if flags & KEXEC_FILE_NO_INITRAMFS else _contents(initrd_fd)
        if not kernel or not cmdline.endswith(b"\0") or len(cmdline) > COMMAND_LINE_SIZE:
            return errno.EINVAL
        if kernel[0x1FE:0x206] != b"\x55\xaa" + kernel[0x200:0x202] + b"HdrS":
            return errno.ENOEXEC
        tree = self.files[f"{KHO}/dt"] if self.active else None
        if tree is not None:
            if any(addr < SCRATCH[0] + SCRATCH[1] and SCRATCH[0] < addr + size for addr, size in regions_of(tree)):
                return errno.EINVAL
            if len(kernel) + len(initrd) + len(tree) > SCRATCH[1]:
                return errno.EADDRNOTAVAIL
        file = file_of(kernel_fd) if kernel_fd >= FIRST_FD else None
        kind = file.kind if isinstance(file, ImageFile) else V3
        self.keep(Image(kind, cmdline[:-1].decode(), tree, by))
        return 0

    def keep(self, image: Image | None) -> None:
        """Have this image loaded, or none."""
        self.image = image
        self.files[LOADED[self.kind]] = b"0\n" if image is None else b"1\n"

    def _permitted(self) -> bool:
        left = int(self.files[LOAD_LIMIT])
        if left > 0:
            self.files[LOAD_LIMIT] = f"{left - 1}\n".encode()
        return left != 0

    def carried(self, image: Image) -> bytes | None:
        """The tree the next kernel would take over, None where it takes nothing."""
        if image.kind != self.kind:
            return None
        return self.tree if self.kind == STATELESS else image.tree

    def sync(self) -> None:
        """Nothing here: the disk hears of it."""


def _contents(fd: int) -> bytes:
    if fd >= FIRST_FD:
        file = file_of(fd)
        return file.content if isinstance(file, ImageFile) else b""
    return os.pread(fd, os.fstat(fd).st_size, 0)
