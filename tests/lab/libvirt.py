# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirtd in a root of its own, with a guest that counts: Debian's libvirt and QEMU, without a host's systemd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.lab import archive, cache
from tests.lab.counter import read_numbers, write_image
from tests.lab.process import call
from tests.unit.khods import REPOSITORY, until

SUITE = "bookworm"
PACKAGES = ("libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86")
EXAMPLES = REPOSITORY / "packaging/examples/libvirt"
CONFIGURATION = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""
"""QEMU as root, because the RAM that came is opened by way of another process; the rest is not there in this root."""
START = """\
mount --make-rprivate /
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
mount --rbind /sys "$0/sys"
mount -t tmpfs tmpfs "$0/run"
exec chroot "$0" /usr/sbin/libvirtd
"""
GUEST = (
    ("type='kvm'", "type='qemu'"),
    ("<memory unit='GiB'>4<", "<memory unit='MiB'>64<"),
    ("<vcpu>2<", "<vcpu>1<"),
    ("<serial type='pty'/>", "<serial type='file'><source path='/srv/serial' append='on'/></serial>"),
    ("unix:/run/khod-libvirt-NAME.qmp", "unix:/srv/qmp"),
    ("<qemu:arg value='-qmp'/>", "<qemu:arg value='-bios'/><qemu:arg value='/srv/counter'/><qemu:arg value='-qmp'/>"),
    ("NAME", "one"),
)
"""What of the example is another for a guest that counts, under TCG."""


class Libvirt:
    """A libvirtd below `root`, which an end of the kernel does not change; its guest is `one`."""

    def __init__(self, root: Path) -> None:
        self.root, self.qmp, self.serial = root, root / "srv/qmp", root / "srv/serial"
        self.starter = root / "srv/start"
        """Starts the guest from outside of the root, as khod-vm does."""
        root.mkdir()
        call(["tar", "--extract", "--file", base(), "--directory", root, "--exclude=./dev/*"])
        (root / "etc/libvirt/qemu.conf").write_text(CONFIGURATION)
        hook = root / "etc/libvirt/hooks/qemu"
        hook.parent.mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / "hook-qemu", hook)
        shutil.copy(EXAMPLES / "start-guest", root / "usr/local/sbin/start-guest")
        write_image(root / "srv/counter")
        text = (EXAMPLES / "guest.xml").read_text()
        for example, ours in GUEST:
            assert example in text, example
            text = text.replace(example, ours)
        (root / "srv/one.xml").write_text(text)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Libvirt:
        """Start libvirtd, as after a boot."""
        with open(self.root.parent / "libvirtd.log", "ab") as log:
            words = ["unshare", "--mount", "sh", "-ec", START, str(self.root)]
            self.process = process = subprocess.Popen(words, stderr=log)
        served = Path(f"/proc/{process.pid}/root/run/libvirt/libvirt-sock")
        until(served.exists, process)
        enter = f"nsenter --mount=/proc/{process.pid}/ns/mnt chroot {self.root}"
        self.starter.write_text(f'#!/bin/sh\nexec {enter} /usr/local/sbin/start-guest "$@"\n')
        self.starter.chmod(0o755)
        return self

    def virsh(self, *words: str) -> str:
        """Carry a command of virsh's out; its output."""
        assert self.process is not None
        enter = ["nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", "chroot", str(self.root)]
        return call([*enter, "virsh", "--quiet", *words])

    @property
    def numbers(self) -> list[int]:
        return read_numbers(self.serial)

    def counts_on(self, more: int = 3) -> int:
        """Wait until the guest has counted on; the last number. None came twice, and none is missing."""
        before = len(self.numbers)
        assert self.process is not None
        until(lambda: len(self.numbers) >= before + more, self.process)
        numbers = self.numbers
        assert numbers == list(range(1, len(numbers) + 1))
        return numbers[-1]

    def end(self) -> None:
        """End libvirtd and its guest with the kernel: every process of this root."""
        for link in Path("/proc").glob("[0-9]*/root"):
            with suppress(OSError):
                if link.readlink() == self.root:
                    os.kill(int(link.parent.name), signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def base() -> Path:
    """Return the tarball of the root, which takes half a minute to make, once."""
    source = archive.source("deb", SUITE)
    options = ["--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--aptopt={archive.STALE_INDEX}"]
    key = cache.key([SUITE, source, *options])
    target = cache.directory() / "base" / f"libvirt-{key}.tar"

    def make(path: Path) -> None:
        call(["mmdebstrap", *options, SUITE, path, source])

    return cache.once(target, make)
