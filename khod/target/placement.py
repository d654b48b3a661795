# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where kexec_file_load(2) will put an image's segments: with KHO on, only in scratch memory.

What the kernel does is in kexec_add_buffer() and locate_mem_hole_callback() (kernel/kexec_file.c) and in
kho_fill_kimage() and kho_locate_mem_hole() (kernel/liveupdate/kexec_handover.c). Each segment in turn, in whole pages,
goes into the first scratch region with a hole for it, in the kernel's order of regions. Within the region it goes as
high as its alignment and the segments before it allow, or as low if the loader asks for that. Without such a region,
the call fails with EADDRNOTAVAIL.

Sizes that cannot be seen from outside are assumed at their largest: PURGATORY, EFI_MAP, DEVICE_TREE, v3's memory cache.
A kernel with CONFIG_IMA_KEXEC places its measurement list before all others; that is not counted here.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from khod.dataclass import dataclass
from khod.images.kernel import KernelImageInfo
from khod.kernel.traits import traits_of
from khod.model import Generation
from khod.region import Region

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SCRATCH_ENTRY = 16  # struct kho_scratch { phys_addr_t addr; phys_addr_t size; }
KHO_ALIGNMENT = 64 * KIB  # kho_fill_kimage(): SZ_64K
# arch/x86/kernel/kexec-bzimage64.c: the lowest addresses. The kernel's is its header's pref_address where that is
# higher (43b1d3e68ee7, Linux 6.8): CONFIG_PHYSICAL_START, 16 MiB unless it was changed.
MIN_PURGATORY, MIN_BOOTPARAM, MIN_KERNEL, MIN_INITRD = 0x3000, 0x3000, 1 * MIB, 16 * MIB
PURGATORY = 24 * KIB
"""One page more than the five in 6.18.15, 6.19.11, 7.3.4 and Debian's 7.2.12."""
EFI_MAP = 64 * 48
"""The size of EFI's runtime memory map: 64 descriptors of 48 bytes, more than firmware usually has."""
BOOT_PARAMS = 4096 + 30 + EFI_MAP + (16 + 96) + (16 + 32) + (16 + 16) + (16 + 32)
"""struct boot_params, MAX_ELFCOREHDR_STR_LEN, and a struct setup_data each for EFI, random seed, IMA and KHO."""
# arch/arm64/kernel/kexec_image.c and machine_kexec_file.c
MIN_KIMG_ALIGN = 2 * MIB
INITRD_WINDOW = 32 * GIB
DEVICE_TREE = 2 * MIB  # MAX_FDT_SIZE
NO_END = 1 << 64


@dataclass(frozen=True)
class Segment:
    """One segment to place; sizes are in bytes, `lowest` is its lowest address, `top_down` means as high as possible.

    Segments after a `base` are placed above it; those with a `window` end within that many bytes of the start of the
    GiB in which the base begins. If there is no room for them, the base moves up to the next hole.
    """

    name: str
    size: int
    alignment: int = 1
    lowest: int = 0
    top_down: bool = True
    base: bool = False
    window: int = 0


@dataclass(frozen=True)
class Placed:
    """A segment and the physical address it gets."""

    segment: Segment
    at: int


@dataclass(frozen=True)
class NoRoom:
    """The first segment for which no region has a hole, and the largest hole for it in bytes."""

    segment: Segment
    hole: int


def list_segments(
    kernel: KernelImageInfo, initrd: int, cmdline: int, generation: Generation, regions: int, tree: int = 0
) -> list[Segment] | None:
    """Return the segments that the loader places, in its order; None if the architecture's loader is not known here.

    `initrd`, `cmdline` (with its NUL) and `tree` (v3 copies it into the image; 0 if its size is not known yet) are in
    bytes.
    """
    if kernel.arch == "x86_64":
        return [*_kho_segments(generation, regions, tree), *_bzimage_segments(kernel, initrd, cmdline)]
    if kernel.arch == "aarch64":
        return [*_kho_segments(generation, regions, tree), *_arm64_segments(kernel, initrd)]
    return None


def place_segments(
    wanted: Sequence[Segment], scratch: Sequence[Region], page: int = mmap.PAGESIZE
) -> list[Placed] | NoRoom:
    """Place every segment as the kernel would; `page` is the running kernel's page size in bytes."""
    whole = [replace(one, size=_round_up(one.size, page), alignment=max(one.alignment, page)) for one in wanted]
    missing: list[NoRoom] = []
    floor = 0
    while True:
        placed, found = _place_from(whole, scratch, floor)
        if found is None:
            return placed
        missing.append(found)
        base = next((one for one in placed if one.segment.base), None)
        if base is None:
            first = missing[0].segment
            return NoRoom(first, max(one.hole for one in missing if one.segment == first))
        floor = base.at + base.segment.size


def _kho_segments(generation: Generation, regions: int, tree: int) -> Iterator[Segment]:
    """Yield KHO's own segments.

    v3 copies its tree, and all its `mem` as one array, which is not larger than the tree; later generations pass a list
    of the scratch regions.
    """
    if traits_of(generation).copies_tree:
        yield Segment("KHO's memory cache", max(tree, 1), KHO_ALIGNMENT)
        yield Segment("KHO's tree", max(tree, 1), KHO_ALIGNMENT)
    else:
        yield Segment("KHO's scratch list", regions * SCRATCH_ENTRY, KHO_ALIGNMENT)


def _bzimage_segments(kernel: KernelImageInfo, initrd: int, cmdline: int) -> Iterator[Segment]:
    """Yield the segments that bzImage64_load() adds."""
    yield Segment("purgatory", PURGATORY, lowest=MIN_PURGATORY)
    yield Segment("boot parameters", BOOT_PARAMS + cmdline, lowest=MIN_BOOTPARAM)
    yield Segment("kernel", kernel.memory, kernel.alignment, max(kernel.pref_address, MIN_KERNEL))
    if initrd:
        yield Segment("initrd", initrd, lowest=MIN_INITRD)


def _arm64_segments(kernel: KernelImageInfo, initrd: int) -> Iterator[Segment]:
    """Yield the segments that image_load() and load_other_segments() add."""
    yield Segment("kernel", kernel.text_offset + kernel.memory, MIN_KIMG_ALIGN, top_down=False, base=True)
    if initrd:
        yield Segment("initrd", initrd, top_down=False, window=INITRD_WINDOW)
    yield Segment("device tree", DEVICE_TREE, MIN_KIMG_ALIGN)


def _place_from(wanted: Iterable[Segment], scratch: Sequence[Region], floor: int) -> tuple[list[Placed], NoRoom | None]:
    """Place as many segments as fit, the base not below `floor`; also return the first that does not fit."""
    placed: list[Placed] = []
    base: Placed | None = None
    for segment in wanted:
        lowest, highest = max(segment.lowest, floor if segment.base else 0), NO_END
        if base is not None:
            lowest = max(lowest, base.at + base.segment.size)
            highest = base.at // GIB * GIB + segment.window if segment.window else NO_END
        bounded = replace(segment, lowest=lowest)
        holes = [hole for region in scratch for hole in _free_holes(bounded, highest, region, placed)]
        hole = next((hole for hole in holes if hole.size >= segment.size), None)
        if hole is None:
            return placed, NoRoom(segment, max((hole.size for hole in holes), default=0))
        end = hole.addr + hole.size
        at = (end - segment.size) // segment.alignment * segment.alignment if segment.top_down else hole.addr
        placed.append(Placed(segment, at))
        base = placed[-1] if segment.base else base
    return placed, None


def _free_holes(segment: Segment, highest: int, region: Region, placed: Iterable[Placed]) -> list[Region]:
    """Return the free holes of a region for a segment, in the order in which the kernel tries them."""
    end = region.addr + region.size
    taken = sorted((one.at, one.at + one.segment.size) for one in placed if region.addr <= one.at < end)
    starts, ends = [region.addr, *(after for _, after in taken)], [*(at for at, _ in taken), end]
    holes = []
    for start, stop in zip(starts, ends, strict=True):
        first, last = _round_up(max(start, segment.lowest), segment.alignment), min(stop, highest)
        if first < last:
            holes.append(Region(first, last - first))
    return holes[::-1] if segment.top_down else holes


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
