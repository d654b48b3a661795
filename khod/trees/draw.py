# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw the summary of a tree as text, with a strip that shows where in physical memory its state lies."""

from collections.abc import Iterator, Mapping

from khod.abi.fdt import KHO_MEM
from khod.dataclass import dataclass
from khod.text import format_size, printable
from khod.trees.memory import MemoryMap
from khod.trees.summary import Blob, Summary
from khod.trees.text import MARK, format_count, format_hex

PERCENT = 0.01
CLASH = {
    True: "the kernel refuses to load an image with this",  # v3: kho_alloc_mem_cache()
    False: "the next kernel is loaded over it",
}


@dataclass(frozen=True)
class Pen:
    """The characters of a strip: `levels` from empty to full, scratch, and memory that overlaps scratch."""

    levels: str
    scratch: str
    clash: str


BLOCKS = Pen(" ▁▂▃▄▅▆▇█", "░", "X")
ASCII = Pen(" .:-=+*#@", "s", "X")


def draw_summary(found: Summary, blobs: Mapping[str, bytes], pen: Pen = BLOCKS) -> Iterator[str]:
    """Yield a description of a tree's blobs and its memory, line by line."""
    for blob in found.blobs:
        yield blob_heading(blob)
        if blob.wrong:
            yield from describe_damage(blob, blobs[blob.name])
            continue
        compatible = f'"{printable(blob.compatible)}", ' if blob.compatible else ""
        properties = format_count(blob.properties, "property", "properties")
        yield f"  {compatible}{format_count(blob.nodes, 'node')}, {properties}"
        for path, length in (blob.mem or {}).items():
            yield f"  {printable(path)} mem: {count_ranges(length)}"
    yield from draw_memory(found, pen)


def blob_heading(blob: Blob) -> str:
    """Return the first line of a blob."""
    exact = f" ({blob.bytes} bytes)" if blob.bytes >> 10 else ""
    return f"{printable(blob.name) or 'root'}: {format_size(blob.bytes)}{exact}"


def describe_damage(blob: Blob, data: bytes) -> Iterator[str]:
    """Yield why a blob cannot be shown, and its first bytes."""
    remedy = f". {blob.remedy}" if blob.remedy else ""
    yield f"  {blob.wrong}{remedy} {MARK if blob.damaged else ''}".rstrip()
    yield f"  {format_hex(data)}"


def count_ranges(length: int) -> str:
    """Format how many ranges a `mem` of `length` bytes has."""
    if length % KHO_MEM.size:
        return f"{length} bytes, no multiple of {KHO_MEM.size}: the kernel ignores it {MARK}"
    return format_count(length // KHO_MEM.size, "range")


def draw_memory(of: Summary, pen: Pen) -> Iterator[str]:
    """Yield the sum of all ranges, and the strip; nothing without ranges."""
    if (found := of.memory) is None:
        return
    yield f"memory: {format_count(found.ranges, 'range')}, {format_size(found.bytes)}"
    how = "merged as the kernel's mem cache" if of.cached else "merged"
    yield f"  {how}: {format_count(found.merged, 'range')}, {format_size(found.merged_bytes)} in whole pages"
    if found.hole:
        yield f"  largest hole: {format_size(found.hole.size)} from {found.hole.addr:#x}"
    if found.beyond:
        yield f"  {format_count(found.beyond, 'range')} run past the end of the address space {MARK}"
    for region in of.scratch:
        yield f"  scratch: {format_size(region.size)} from {region.addr:#x}"
    if found.in_scratch:
        yield f"  {format_size(found.in_scratch)} of it lie in scratch: {CLASH[of.cached]} {MARK}"
    yield from draw_strip(found, pen, scratch=bool(of.scratch))


def draw_strip(found: MemoryMap, pen: Pen, *, scratch: bool) -> Iterator[str]:
    """Draw the memory from the lowest address to the highest, scaled to the fullest column if that has PERCENT."""
    fullest = max(found.density)
    top = len(pen.levels) - 1 if fullest >= PERCENT else 1
    drawn = [
        pen.clash
        if clash
        else pen.levels[max(1, round(density / fullest * top))]
        if density
        else pen.scratch
        if at
        else pen.levels[0]
        for density, at, clash in zip(found.density, found.scratch, found.clash, strict=True)
    ]
    yield f"|{''.join(drawn)}|"
    legend = f"{pen.levels[top]} {'under 1%' if fullest < PERCENT else f'{fullest:.0%}'} used"
    legend += f", {pen.scratch} scratch" if scratch else ""
    legend += f", {pen.clash} both" if any(found.clash) else ""
    first, last = f"{found.start:#x}", f"{found.end - 1:#x}"
    room = len(found.density) + 2 - len(first) - len(last)  # with the bars before the first and after the last column
    yield f"{first}{legend:^{max(len(legend) + 2, room)}}{last}"
