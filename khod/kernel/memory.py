# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory the kernel can allocate in khod's name.

It is that of the host khod runs on, also with a simulated kernel: the files that producers hand over use this host's
memory.
"""

from contextlib import suppress
from pathlib import Path

from khod.dataclass import dataclass

MEMINFO = "proc/meminfo"
CGROUP = "proc/self/cgroup"
HIERARCHY = "sys/fs/cgroup"


@dataclass(frozen=True)
class MemoryBounds:
    """Memory in bytes: the host's total, and what is available without swapping within khod's control groups."""

    total: int
    available: int


def read_memory(root: Path = Path("/")) -> MemoryBounds:
    """Read the bounds; raise OSError or ValueError if /proc does not have them."""
    fields = dict(line.partition(":")[::2] for line in (root / MEMINFO).read_text().splitlines())
    total, available = (int(fields.get(name, "").removesuffix("kB")) << 10 for name in ("MemTotal", "MemAvailable"))
    return MemoryBounds(total, min([available, *_cgroup_limits(root)]))


def _cgroup_limits(root: Path) -> list[int]:
    """Return the bytes left in khod's control group and in those above it that have a limit (cgroup v2)."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        lines = (root / CGROUP).read_text().splitlines()
        group = "".join(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        at = root / HIERARCHY / group.strip("/")
        while at != root / HIERARCHY and ".." not in at.parts:
            with suppress(OSError, ValueError):  # "max" means no limit
                found.append(max(0, int((at / "memory.max").read_text()) - int((at / "memory.current").read_text())))
            at = at.parent
    return found
