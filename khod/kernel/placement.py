"""Where kexec_file_load(2) will put an image's segments: with KHO on, in scratch memory alone, or nowhere.

What the kernel does (kernel/kexec_file.c, locate_mem_hole_top_down(); kernel/liveupdate/kexec_handover.c,
kho_locate_mem_hole()): each segment in turn goes into the first scratch region that has a hole for it, in the order
the kernel lists them, as high up in there as its alignment and what was placed before it allow. EADDRNOTAVAIL where
no region has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from khod.images.kernel import Kernel
from khod.model import Generation, Region

PAGE = 4096
SCRATCH_ENTRY = 16  # struct kho_scratch { phys_addr_t addr; phys_addr_t size; }
SCRATCH_ALIGNMENT = 0x10000  # kho_fill_kimage(): SZ_64K
# arch/x86/kernel/kexec-bzimage64.c: the lowest addresses, and what goes in front of the kernel.
MIN_PURGATORY, MIN_BOOTPARAM, MIN_KERNEL, MIN_INITRD = 0x3000, 0x3000, 0x100000, 0x1000000
PURGATORY = 8 * PAGE
"""More than any build's: it has the SHA-256 code, a stack of a page and its data."""
BOOT_PARAMS = 4 * PAGE
"""struct boot_params (a page), the EFI memory map and the setup_data for EFI, KHO, IMA and the random seed."""


@dataclass(frozen=True)
class Segment:
    """One segment to be placed: `size` and `alignment` in bytes, `lowest` the lowest address it may have."""

    name: str
    size: int
    alignment: int = PAGE
    lowest: int = 0


@dataclass(frozen=True)
class Placed:
    """A segment and the physical address it gets."""

    segment: Segment
    at: int


@dataclass(frozen=True)
class NoRoom:
    """The first segment that no region has a hole for, and the size in bytes of the largest hole left."""

    segment: Segment
    hole: int


def segments(
    kernel: Kernel, initrd: int, cmdline: int, generation: Generation, regions: int, tree: int = 0
) -> list[Segment] | None:
    """What the loader places, in its order; None for an architecture whose loader is not known here.

    `initrd`, `cmdline` (with its NUL) and `tree` (of v3, which copies it into the image) are in bytes.
    """
    if kernel.arch != "x86_64":
        return None
    handover = [Segment("KHO's scratch list", regions * SCRATCH_ENTRY, SCRATCH_ALIGNMENT)]
    if generation is Generation.sysfs and tree:
        handover = [Segment("KHO's tree", tree), Segment("KHO's memory cache", tree), *handover]
    return [
        *handover,
        Segment("purgatory", PURGATORY, lowest=MIN_PURGATORY),
        Segment("boot parameters", BOOT_PARAMS + cmdline, lowest=MIN_BOOTPARAM),
        Segment("kernel", kernel.memory, kernel.alignment, MIN_KERNEL),
        *([Segment("initrd", initrd, lowest=MIN_INITRD)] if initrd else []),
    ]


def place(wanted: Sequence[Segment], scratch: Sequence[Region]) -> list[Placed] | NoRoom:
    """Place every segment as the kernel would."""
    placed: list[Placed] = []
    for segment in wanted:
        at = next((at for region in scratch if (at := _hole(segment, region, placed)) is not None), None)
        if at is None:
            return NoRoom(segment, _largest(scratch, placed))
        placed.append(Placed(segment, at))
    return placed


def _hole(segment: Segment, region: Region, placed: Sequence[Placed]) -> int | None:
    """The highest place in a region, clear of all that was placed before."""
    size, alignment = _pages(segment.size), max(segment.alignment, PAGE)
    at = (region.addr + region.size - size) // alignment * alignment
    while at >= max(region.addr, segment.lowest):
        met = [other for other in placed if other.at < at + size and at < other.at + _pages(other.segment.size)]
        if not met:
            return at
        at = (min(other.at for other in met) - size) // alignment * alignment
    return None


def _largest(scratch: Sequence[Region], placed: Sequence[Placed]) -> int:
    """The largest hole that is left, in bytes."""
    largest = 0
    for region in scratch:
        inside = sorted(
            (one for one in placed if region.addr <= one.at < region.addr + region.size), key=lambda one: one.at
        )
        begin = region.addr
        for one in inside:
            largest, begin = max(largest, one.at - begin), one.at + _pages(one.segment.size)
        largest = max(largest, region.addr + region.size - begin)
    return largest


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
