# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mainline KHO: /sys/kernel/debug/kho, with `finalize` (6.16-7.0) and without it (7.1 and later)."""

from khod.abi.calls import Calls
from khod.kernel.protocol import AbortKind, Tree, pair_regions
from khod.model import Generation, Order
from khod.region import Region

KHO = "/sys/kernel/debug/kho"
SCRATCH_NAMES = ("bootmem", "scratch")
"""The names of KHO's scratch memory in debugfs (NAME_phys, NAME_len) and on the command line (kho_NAME=).

Linux 7.4 renamed it (85d3615cea17, 8fe64603a475); the kernel's files tell which name it has. Before that, a node
without memory had a region of 0x0, which is not counted.
"""


class Stateless:
    """KHO of 7.1 and later: nothing is written, the outgoing tree is always current."""

    generation = Generation.stateless
    order = Order.load_first
    abort = AbortKind.needless
    entering = "nothing to write: this kernel's state is always current"
    leaving = "nothing: there is no phase to leave"

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def is_active(self) -> bool | None:
        return None

    def activate(self) -> None:
        """Do nothing: KHO is stateless since Linux 7.1."""

    def deactivate(self) -> None:
        """Do nothing: there is no phase to leave."""

    def outgoing_tree(self) -> Tree:
        # `out/fdt` may be cut off without damage: on 7.3.4, debugfs shows as many bytes as the tree had when the file
        # was made at boot (233), while subtrees made it grow (345). In a kernel that was reached by a handover it may
        # be missing. The kernel hands over all of it in both cases, and the comparison after the jump uses the blobs.
        return self._read_tree("out")

    def has_arrived(self) -> bool:
        return self._calls.path_exists(f"{KHO}/in/fdt")

    def arrived_tree(self) -> Tree | None:
        return self._read_tree("in") if self.has_arrived() else None

    def scratch_regions(self) -> list[Region]:
        name = scratch_name(self._calls)
        return pair_regions(*(self._calls.read_file(f"{KHO}/out/{name}_{what}") for what in ("phys", "len")))

    @property
    def scratch_parameter(self) -> str:
        return f"kho_{scratch_name(self._calls)}="

    def _read_tree(self, side: str) -> Tree:
        blobs = f"{KHO}/{side}/sub_fdts"
        return Tree(
            self._calls.read_file(f"{KHO}/{side}/fdt") if self._calls.path_exists(f"{KHO}/{side}/fdt") else b"",
            {name: self._calls.read_file(f"{blobs}/{name}") for name in self._calls.list_directory(blobs)},
        )


class FinalizeNoAbort(Stateless):
    """KHO of 6.19-7.0: `finalize` accepts 1 any number of times, and returns EINVAL for 0."""

    generation = Generation.finalize_no_abort
    entering = f"write 1 to {KHO}/out/finalize"

    def activate(self) -> None:
        self._calls.write_file(f"{KHO}/out/finalize", b"1\n")


class Finalize(FinalizeNoAbort):
    """KHO of 6.16-6.18: a load before finalize carries nothing, and an abort forgets (see AbortKind)."""

    generation = Generation.finalize
    order = Order.activate_first
    abort = AbortKind.forgets
    leaving = f"write 0 to {KHO}/out/finalize: this kernel then forgets what was preserved before, until a reboot"

    def is_active(self) -> bool:
        return self._calls.read_file(f"{KHO}/out/finalize").strip() not in (b"0", b"N")

    def deactivate(self) -> None:
        self._calls.write_file(f"{KHO}/out/finalize", b"0\n")


def scratch_name(calls: Calls) -> str:
    """Return this kernel's name for its scratch memory, or the older name if it shows neither."""
    return next((name for name in SCRATCH_NAMES if calls.path_exists(f"{KHO}/out/{name}_phys")), SCRATCH_NAMES[-1])
