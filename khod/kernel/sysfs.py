# SPDX-License-Identifier: LGPL-2.1-or-later
"""KHO v3 (patch series of January 2024): /sys/kernel/kho, the generation khod was made for."""

from typing import TYPE_CHECKING

from khod.abi.calls import Calls
from khod.deferred import defer_module
from khod.kernel.protocol import AbortKind, Tree, pair_regions
from khod.model import Generation, Order
from khod.region import Region

if TYPE_CHECKING:
    from khod.abi import fdt
else:
    fdt = defer_module("khod.abi.fdt")

KHO = "/sys/kernel/kho"
IN_DT = "/sys/firmware/kho/dt"


class SysfsKho:
    """KHO v3, driven by `active`: 1 enters the active phase, 0 leaves it.

    The kernel's document says `echo 1` for the abort too. That is a mistake: writing the value that `active` already
    has succeeds and does nothing.
    """

    generation = Generation.sysfs
    order = Order.activate_first
    abort = AbortKind.clean
    entering = f"write 1 to {KHO}/active"
    leaving = f"write 0 to {KHO}/active"
    scratch_parameter = "kho_scratch="

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def is_active(self) -> bool:
        return self._calls.read_file(f"{KHO}/active").strip() == b"1"

    def activate(self) -> None:
        self._calls.write_file(f"{KHO}/active", b"1\n")

    def deactivate(self) -> None:
        self._calls.write_file(f"{KHO}/active", b"0\n")

    def outgoing_tree(self) -> Tree:
        root = self._calls.read_file(f"{KHO}/dt")
        fdt.check_fdt(root, f"{KHO}/dt")
        return Tree(root)

    def has_arrived(self) -> bool:
        return self._calls.path_exists(IN_DT)

    def arrived_tree(self) -> Tree | None:
        return Tree(self._calls.read_file(IN_DT)) if self.has_arrived() else None

    def scratch_regions(self) -> list[Region]:
        return pair_regions(self._calls.read_file(f"{KHO}/scratch_phys"), self._calls.read_file(f"{KHO}/scratch_len"))
