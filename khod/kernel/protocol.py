# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every KHO generation offers, and the state tree."""

import enum
from dataclasses import field
from typing import Protocol

from khod.dataclass import dataclass
from khod.model import Generation, Order
from khod.region import Region


class AbortKind(enum.Enum):
    """What leaving the active phase costs."""

    clean = "clean"  # v3: write 0, nothing is lost
    forgets = "forgets"  # 6.16-6.18: pages preserved before finalize are forgotten until a reboot
    needless = "needless"  # 6.19+: the state is always current, there is nothing to leave


@dataclass(frozen=True)
class Tree:
    """The state as the kernel shows it: the bytes of the root FDT, and each producer's blob by name.

    On v3 everything is in the root and `blobs` is empty. From 7.1 on, a blob need not be an FDT.
    """

    root: bytes
    blobs: dict[str, bytes] = field(default_factory=dict)


class KhoKernel(Protocol):
    """One generation of KHO. Calls raise OSError with the kernel's errno, the call and the path."""

    generation: Generation
    order: Order
    abort: AbortKind
    entering: str
    """The action that enters the active phase, for people."""
    leaving: str
    """The action that leaves the active phase, for people."""

    @property
    def scratch_parameter(self) -> str:
        """The kernel parameter for the size of the scratch memory, with its `=`."""

    def is_active(self) -> bool | None:
        """Whether the kernel is in the active phase; None if it has no such phase."""

    def activate(self) -> None:
        """Enter the active phase: every kernel producer serializes its state."""

    def deactivate(self) -> None:
        """Leave the active phase, from the thread that entered it."""

    def outgoing_tree(self) -> Tree:
        """Read the outgoing state; raise MalformedTree if it is damaged.

        Do not call it while another thread leaves the active phase: v3 deadlocks.
        """

    def has_arrived(self) -> bool:
        """Whether the previous kernel handed anything over; the state is not read."""

    def arrived_tree(self) -> Tree | None:
        """Read the state that the previous kernel handed over; return None if there is none."""

    def scratch_regions(self) -> list[Region]:
        """Return the regions that the next kernel and its initrd must fit into."""


def pair_regions(phys: bytes, length: bytes) -> list[Region]:
    """Pair scratch_phys with scratch_len (or bootmem_*), line by line; a line may be 0x0, which is not a region."""
    pairs = zip(phys.split(), length.split(), strict=True)
    return [Region(int(addr, 16), int(size, 16)) for addr, size in pairs if int(size, 16)]
