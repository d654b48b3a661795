# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests' disk: a Debian root file system with the project's packages and the lab's files, as a raw ext4 image.

The image is never mounted on the host: the tree is unpacked below the cache, changed there and put into the image by
mke2fs -d. Guests never write to an image (QEMU keeps an overlay for each), so one serves all scenarios at once.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.lab import archive, cache, rootfs
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel
from tests.lab.process import call

SUITE = "forky"
SIZE = "2G"  # sparse: the file takes what is in it, about 300 MiB
KEPT_DISKS = 4
KERNELS = "/lab/kernels"
INITRD = "/lab/initrd.img"
MODULE = "/lab/kho_v3.ko"

Files = Mapping[str, Path | bytes]  # guest path: file of the host, or content

# Maintainer scripts need /proc and /dev; in a mount namespace of its own nothing stays mounted, whatever happens.
INSTALL = """\
set -e
root=$1; shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" env DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin dpkg --install "$@"
"""


def base() -> Path:
    """Give the tarball of the Debian system every disk starts from; making it takes a minute, once.

    LabError if mmdebstrap fails: no network, or a package that the suite no longer has.
    """
    excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in rootfs.EXCLUDED]
    options = [
        "--variant=minbase",
        f"--include={','.join(rootfs.PACKAGES)}",
        f"--aptopt={archive.STALE_INDEX}",
        *excludes,
    ]
    source = archive.source("deb", SUITE)
    target = cache.directory() / "base" / f"{SUITE}-{cache.key([SUITE, source, *options])}.tar"
    return cache.once(target, lambda path: _debootstrap(options, source, path))


def _debootstrap(options: Sequence[str], source: str, path: Path) -> None:
    """Make the base tarball; mmdebstrap needs root or a user namespace."""
    _need_root()
    call(["mmdebstrap", "--mode=root", *options, SUITE, path, source])


def build(debs: Sequence[Path] = (), files: Files | None = None, *, as_installed: bool = False) -> Path:
    """Give the image with these packages installed and these files (guest path: file of the host, or content) in place.

    With `as_installed` nothing is left out to boot fast.

    A host file keeps its mode, content gets 0644. The same packages and files give the same image from the cache; the
    KEPT_DISKS newest images are kept. LabError if a package does not install: what it depends on must be in
    rootfs.PACKAGES.
    """
    files = files or {}
    tarball = base()
    parts: list[str | bytes | Path] = [tarball.name, Path(__file__), Path(rootfs.__file__), *rootfs.FILES.values()]
    parts.append(repr(as_installed))
    parts += debs
    for path in sorted(files):
        parts += [path, files[path]]
    folder = cache.directory() / "disks"
    image = cache.once(
        folder / f"disk-{cache.key(parts)}.ext4", lambda path: _build(tarball, debs, files, path, as_installed)
    )
    os.utime(image)  # the newest are those used last
    cache.prune(folder, "disk-*.ext4", KEPT_DISKS)
    return image


def _build(tarball: Path, debs: Sequence[Path], files: Files, image: Path, as_installed: bool) -> None:
    """Unpack, install, settle, and put the tree into an image."""
    _need_root()
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="tree-") as name:
        root = Path(name)
        root.chmod(0o755)
        call(["tar", "--extract", "--numeric-owner", "--file", tarball, "--directory", root])
        _install(root, debs)
        rootfs.settle(root, as_installed=as_installed)
        for path, content in files.items():
            place = rootfs.below(root, path)
            place.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            place.chmod(0o644 if isinstance(content, bytes) else content.stat().st_mode & 0o7777)
        # A journal, though a small one: a scenario resets the machine and then reads what was fsynced before.
        call(
            [
                "mke2fs",
                "-q",
                "-t",
                "ext4",
                "-J",
                "size=16",
                "-E",
                "lazy_itable_init=0,root_owner=0:0",
                "-d",
                root,
                image,
                SIZE,
            ]
        )


def _install(root: Path, debs: Sequence[Path]) -> None:
    """Install packages with the guest's own dpkg, so that their maintainer scripts run as they would there."""
    if not debs:
        return
    policy = rootfs.below(root, "/usr/sbin/policy-rc.d")
    policy.write_text("#!/bin/sh\nexit 101\n")  # no service can start in a tree: Debian's way to say so
    policy.chmod(0o755)
    inside = []
    for deb in debs:
        place = rootfs.below(root, f"/tmp/{deb.name}")
        place.write_bytes(deb.read_bytes())
        inside.append(f"/tmp/{deb.name}")
    call(["unshare", "--mount", "--fork", "sh", "-c", INSTALL, "install", root, *inside])
    for leftover in (policy, *(rootfs.below(root, path) for path in inside)):
        leftover.unlink()


def _need_root() -> None:
    """LabError unless this process may make files of any owner."""
    if os.geteuid() != 0:
        raise LabError("the lab's disk is made as root: run the tests as root (in a throw-away machine or container)")


def standard_files(kernels: Iterable[Kernel], module: Path | None = None) -> dict[str, Path | bytes]:
    """The files every scenario may count on: each kernel's image below KERNELS, INITRD, and MODULE if given."""
    files: dict[str, Path | bytes] = {f"{KERNELS}/{kernel.version}/bzImage": kernel.bzimage for kernel in kernels}
    files[INITRD] = initrd({"khod-lab-initrd": b"a marker, no system\n"})
    if module is not None:
        files[MODULE] = module
    return files


def initrd(files: Mapping[str, bytes]) -> bytes:
    """Give a gzipped newc cpio archive of these files; a kernel unpacks it and boots from its disk all the same."""
    members = [*files.items(), ("TRAILER!!!", b"")]
    archived = b"".join(_member(number, name, data) for number, (name, data) in enumerate(members))
    return gzip.compress(archived, mtime=0)


def _member(inode: int, name: str, data: bytes) -> bytes:
    """One newc member: thirteen fields of eight hex digits, the name and the data, both padded to four bytes."""
    mode = 0o100644 if data else 0
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    """`data` with zeros up to a multiple of four."""
    return data + bytes(-len(data) % 4)
