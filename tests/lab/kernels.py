# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernels that guests run, by version: prebuilt, from the lab's cache, or built.

`python3 -m tests.lab.kernels list` says which are here and which the archive has;
`python3 -m tests.lab.kernels build VERSION` builds one into the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, kernelbuild
from tests.lab.archive import SOURCE_PACKAGE, KernelArchive
from tests.lab.errors import LabError

ENVIRONMENT = "KHO_LAB_KERNELS"
VERSIONS = ("6.18.15", "6.19.11", "7.3.4")  # a stock kernel for each generation of KHO; v3 is a module on 7.3.4
SIGNED = "7.3.4-signed"  # a variant of its own: signed, and it loads nothing that is not
UPGRADE = "7.2.12"  # another release that speaks the formats of 7.3.4
NEXT_LUO = "7.2.12-luo6"  # a variant of it that speaks another format of LUO's
MEMFD = "7.2.12-memfd3"  # and one that hands memfds over in another format
MODULE = Path(__file__).parent / "module"


@dataclass(frozen=True)
class Kernel:
    """One kernel: its image, its configuration, and the packed tree modules are built against, where there is one."""

    version: str
    bzimage: Path
    config: Path
    devel: Path | None

    def module(self, source: Path = MODULE) -> Path:
        """Give the .ko of an out-of-tree module for this kernel, built or cached; LabError without a devel tree."""
        if self.devel is None:
            raise LabError(
                f"{self.bzimage.parent} has no devel.tar.zst, which {source} is built against: "
                f"python3 -m tests.lab.kernels build {self.version}"
            )
        return kernelbuild.build_module(source, self.devel)


def folders() -> list[Path]:
    """Where kernels are looked for, in order: the directory named by KHO_LAB_KERNELS, and the lab's cache."""
    prebuilt = os.environ.get(ENVIRONMENT)
    return [*([Path(prebuilt)] if prebuilt else []), cache.directory() / "kernels"]


def find(version: str) -> Kernel:
    """A kernel that is there already, or else built now, which takes a quarter of an hour.

    LabError if it is nowhere and cannot be built: never a skip, since a scenario without its kernel has proved nothing.
    """
    return look(version) or build(version)


def look(version: str) -> Kernel | None:
    """A kernel from the first of folders() that has it, or None; LabError for a directory without its config."""
    for folder in folders():
        bzimage, config, devel = (folder / version / name for name in ("bzImage", "config", "devel.tar.zst"))
        if bzimage.exists():
            if not config.exists():
                raise LabError(f"{bzimage} has no {config.name} next to it: put the kernel's .config there")
            return Kernel(version, bzimage, config, devel if devel.exists() else None)
    return None


def build(version: str) -> Kernel:
    """Build a kernel into the cache, unless it is there; VERSION-VARIANT is a variant of VERSION, see kernelbuild."""
    target = cache.directory() / "kernels" / version
    upstream, _, variant = version.partition("-")
    try:
        cache.once(target, lambda path: kernelbuild.build(upstream, path, variant))
    except LabError as error:
        places = ", ".join(str(folder / version) for folder in folders())
        raise LabError(f"no kernel {version} in {places}, and building it failed: {error}") from error
    return Kernel(version, target / "bzImage", target / "config", target / "devel.tar.zst")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status: 0 done, 1 the lab could not, 2 usage."""
    try:
        match arguments:
            case ["list"]:
                for version in (*VERSIONS, SIGNED, UPGRADE, NEXT_LUO, MEMFD):
                    kernel = look(version)
                    print(f"{version}: {kernel.bzimage if kernel else 'not here'}")
                print(f"listed in the archive: {' '.join(KernelArchive().versions(SOURCE_PACKAGE))}")
            case ["build", version]:
                print(build(version).bzimage)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
