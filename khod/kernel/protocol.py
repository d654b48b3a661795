# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every KHO generation offers, and the state tree it speaks of."""

import enum
from dataclasses import dataclass, field
from typing import Protocol

from khod.model import Generation, Order
from khod.region import Region


class AbortKind(enum.Enum):
    """What leaving the active phase costs."""

    clean = "clean"  # v3: write 0, nothing is lost
    forgets = "forgets"  # 6.16-6.18: pages preserved before finalize are forgotten until a reboot
    needless = "needless"  # 6.19+: the state is always current, there is nothing to leave


@dataclass(frozen=True)
class Tree:
    """The state as the kernel shows it: the root FDT's bytes and each producer's blob by name.

    On v3 everything is in the root and `blobs` is empty. From 7.1 a blob need not be an FDT.
    """

    root: bytes
    blobs: dict[str, bytes] = field(default_factory=dict)


class KhoKernel(Protocol):
    """One generation of KHO. Calls raise OSError with the kernel's errno, the call and the path."""

    generation: Generation
    order: Order
    abort: AbortKind
    entering: str
    """What enters the active phase, for people."""
    leaving: str
    """What leaves it."""

    @property
    def scratch_parameter(self) -> str:
        """The parameter by which this kernel is told how much scratch memory to reserve, with its `=`."""

    def is_active(self) -> bool | None:
        """Tell whether the kernel is in the active phase; None where it has none to leave."""

    def activate(self) -> None:
        """Enter the active phase: every kernel producer serializes its state."""

    def deactivate(self) -> None:
        """Leave the active phase, from the thread that entered it."""

    def outgoing_tree(self) -> Tree:
        """Read the outgoing state; MalformedTree where it is damaged.

        Never while another thread leaves the active phase: v3 deadlocks.
        """

    def has_arrived(self) -> bool:
        """Tell whether the previous kernel handed anything over, without reading it."""

    def arrived_tree(self) -> Tree | None:
        """Read the state the previous kernel handed over; None where nothing came."""

    def scratch_regions(self) -> list[Region]:
        """The regions kernel and initrd must fit into."""


def pair_regions(phys: bytes, length: bytes) -> list[Region]:
    """Pair scratch_phys with scratch_len (or bootmem_*), a line each; a line may be 0x0, which is not a region."""
    pairs = zip(phys.split(), length.split(), strict=True)
    return [Region(int(addr, 16), int(size, 16)) for addr, size in pairs if int(size, 16)]
