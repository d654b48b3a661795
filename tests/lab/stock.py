# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's own kernel, as it ships: it has no Kexec HandOver, and khod must say so.

Its disk driver is a module, so it comes with an initrd: busybox, the modules, and a script that goes on to /dev/vda.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, disk
from tests.lab.archive import KernelArchive, mirror
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel
from tests.lab.process import call

META = "linux-image-cloud-amd64"  # the kernel for virtual machines: a fifth of the other's modules
PARTS = ("base", "binary", "modules")  # the packages linux-PART-RELEASE: config, vmlinuz, modules
BUSYBOX = "busybox-static"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")  # some are built in, which modprobe knows
UNPACK: dict[str, Sequence[str]] = {
    ".xz": ("xz", "--decompress"),
    ".zst": ("zstd", "--quiet", "--decompress", "--rm"),
}
HANDOVER = "CONFIG_KEXEC_HANDOVER=y"

# Whatever fails ends it, and the kernel panics: the lab reports that as a lost guest, with the last lines.
INIT = """\
#!/busybox sh
set -e
/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
    /busybox insmod "$module"
done
/busybox mount -t ext4 /dev/vda /disk
/busybox mount -o move /dev /disk/dev
exec /busybox switch_root /disk /sbin/init
"""


@dataclass(frozen=True)
class Stock:
    """The kernel, found by the `boot` fixture under its version, the release it calls itself, and its initrd."""

    kernel: Kernel
    release: str
    initrd: Path

    @property
    def qemu_extra(self) -> list[str]:
        """The arguments of QEMU it needs."""
        return ["-initrd", str(self.initrd)]


class _Archive(KernelArchive):
    """Debian's archive, for binary packages."""

    def fetch(self, packages: Sequence[str], into: Path) -> list[Path]:
        """Download packages of the guests' suite; LabError where it has none of that name."""
        call(["apt-get", "download", *(f"{name}/{disk.SUITE}" for name in packages)], cwd=into, env=self._env)
        return [next(into.glob(f"{name}_*.deb")) for name in packages]


def find() -> Stock:
    """Give Debian's kernel from the lab's cache, or else fetch the suite's newest (40 MB, unpacked, never installed).

    LabError if the archive does not have it, or if Debian has turned Kexec HandOver on: then it proves nothing here.
    """
    made_of = cache.key([mirror(), disk.SUITE, Path(__file__)])
    target = cache.once(cache.directory() / "kernels" / f"stock-{made_of}", _build)
    release = (target / "release").read_text()
    return Stock(Kernel(target.name, target / "bzImage", target / "config", None), release, target / "initrd")


def _build(target: Path) -> None:
    """Fetch the packages, take kernel and config out of them, and make the initrd."""
    target.mkdir()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="packages-") as name:
        folder, root = Path(name), Path(name) / "root"
        (root / "usr/lib").mkdir(parents=True)
        (root / "lib").symlink_to("usr/lib")  # modprobe looks below /lib
        source = _Archive()
        (meta,) = source.fetch([META], folder)
        release = _release(call(["dpkg-deb", "--field", meta, "Depends"]))
        for deb in source.fetch([*(f"linux-{part}-{release}" for part in PARTS), BUSYBOX], folder):
            call(["dpkg-deb", "--extract", deb, root])
        modules = root / "lib/modules" / release
        if HANDOVER in (modules / "config").read_text():
            raise LabError(f"Debian's kernel {release} has {HANDOVER}: tests/lab/stock.py needs one without")
        os.rename(modules / "vmlinuz", target / "bzImage")
        os.rename(modules / "config", target / "config")
        (target / "release").write_text(release)
        _initrd(root, _modules(root, release), folder / "initrd", target / "initrd")


def _release(depends: str) -> str:
    """Give the release of the kernel that the meta package stands for."""
    if found := re.search(r"\blinux-image-(\d[^\s,]*)", depends):
        return found[1]
    raise LabError(f"{META} depends on no kernel any more: {depends}")


def _modules(root: Path, release: str) -> list[Path]:
    """Give the files of MODULES and of what they need, decompressed, in the order to load them in."""
    call(["depmod", "--basedir", root, release])
    wanted: list[str] = []
    for module in MODULES:
        said = call(
            ["modprobe", "--config", "/dev/null", "--dirname", root, "--set-version", release, "--show-depends", module]
        )
        wanted += re.findall(r"^insmod (\S+)", said, re.MULTILINE)
    return [_unpacked(Path(path)) for path in dict.fromkeys(wanted)]


def _unpacked(module: Path) -> Path:
    """Decompress a module in place."""
    if module.suffix not in UNPACK:
        return module
    call([*UNPACK[module.suffix], module])
    return module.with_suffix("")


def _initrd(root: Path, modules: Sequence[Path], tree: Path, initrd: Path) -> None:
    """Pack INIT, busybox and the modules; not compressed, since the guest's processor is the slow part."""
    for folder in ("dev", "disk", "modules"):
        (tree / folder).mkdir(parents=True)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    os.rename(root / "usr/bin/busybox", tree / "busybox")
    for number, module in enumerate(modules):
        os.rename(module, tree / f"modules/{number:02}-{module.name}")
    call(["sh", "-ec", 'find . | cpio --quiet --create --format=newc > "$1"', "pack", initrd], cwd=tree)
