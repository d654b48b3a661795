# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images as Debian ships them for each architecture, and ukify: fetched once, unpacked, never installed."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab import archive, cache, disk
from tests.lab.errors import LabError
from tests.lab.process import call

# The meta package of each of Debian's architectures. arm64's and amd64's kernels are signed, and have an unsigned twin.
METAS = {
    "amd64": "linux-image-amd64",
    "arm64": "linux-image-cloud-arm64",
    "riscv64": "linux-image-riscv64",
    "loong64": "linux-image-loong64",
    "ppc64el": "linux-image-powerpc64le",
    "s390x": "linux-image-s390x",
}
SIGNED = ("amd64", "arm64")
UKIFY = ("systemd-ukify", "systemd-boot-efi")


@dataclass(frozen=True)
class Packaged:
    """A kernel by its package: the release in its name, its image and configuration, its unsigned twin's image."""

    release: str
    vmlinuz: Path
    config: Path
    unsigned: Path | None


def find(architecture: str) -> Packaged:
    """Give the suite's kernel for a Debian architecture; LabError if the archive does not have it."""
    root = _packages() / architecture
    release = (root / "release").read_text()
    modules = Path("usr/lib/modules") / release
    unsigned = root / "unsigned" / modules / "vmlinuz.unsigned"
    return Packaged(
        release, root / modules / "vmlinuz", root / modules / "config", unsigned if unsigned.exists() else None
    )


def ukify() -> tuple[Path, Path]:
    """Give the script ukify and the stub it puts images behind; it needs pefile, which stands among the dev extras."""
    root = _packages() / "ukify"
    return root / "usr/bin/ukify", root / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"


@functools.cache
def _packages() -> Path:
    """Give the directory of all of them, from the lab's cache or fetched now (100 MB)."""
    made_of = cache.key([archive.mirror(), disk.SUITE, Path(__file__)])
    return cache.once(cache.directory() / "packages" / made_of, _fetch)


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="packages-") as name:
        apt = _Apt(Path(name))
        for architecture, meta in METAS.items():
            root = target / architecture
            release = apt.release(meta, architecture)
            apt.unpack(f"linux-binary-{release}", architecture, root)
            apt.unpack(f"linux-base-{release}", architecture, root)
            if architecture in SIGNED:
                apt.unpack(f"linux-binary-unsigned-{release}", architecture, root / "unsigned")
            (root / "release").write_text(release)
        for package in UKIFY:
            apt.unpack(package, "amd64", target / "ukify")


class _Apt:
    """An apt of several architectures, below a directory of its own."""

    def __init__(self, root: Path) -> None:
        for folder in archive.FOLDERS:
            (root / folder).mkdir(parents=True)
        (root / "etc/sources.list").write_text(archive.source("deb", disk.SUITE) + "\n")
        architectures = " ".join(f'"{architecture}";' for architecture in METAS)
        configuration = root / "apt.conf"
        configuration.write_text(
            f"{archive.CONFIGURATION.format(root=root)}#clear APT::Architectures;\n"
            f"APT::Architectures {{ {architectures} }};\n"
        )
        self._root = root
        self._env = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
        call(["apt-get", "--error-on=any", "update"], env=self._env)

    def release(self, meta: str, architecture: str) -> str:
        """Give the release of the kernel that a meta package stands for."""
        said = call(["apt-cache", "show", "--no-all-versions", f"{meta}:{architecture}"], env=self._env)
        if found := re.search(r"^Depends:.*?\blinux-image-(\d[^\s,]*)", said, re.MULTILINE):
            return found[1]
        raise LabError(f"{meta} depends on no kernel any more: {said}")

    def unpack(self, package: str, architecture: str, into: Path) -> None:
        """Download a package and unpack it; LabError where there is none."""
        into.mkdir(parents=True, exist_ok=True)
        call(["apt-get", "download", f"{package}:{architecture}"], cwd=self._root, env=self._env)
        deb = next(self._root.glob(f"{package}_*.deb"))
        call(["dpkg-deb", "--extract", deb, into])
        deb.unlink()
