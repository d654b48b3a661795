# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the loader puts its segments: what kernels logged, and layouts worked out by hand from the kernel's rules."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from khod.images.kernel import KernelImageInfo, Signature
from khod.model import Generation
from khod.region import Region
from khod.target.placement import NoRoom, Placed, Segment, list_segments, place_segments

PAGE, KIB, MIB, GIB = 1 << 12, 1 << 10, 1 << 20, 1 << 30
CMDLINE = 31  # bytes, "console=ttyS0 root=/dev/vda rw" and its NUL
KERNEL = KernelImageInfo(
    format="bzImage",
    arch="x86_64",
    version="next",
    cmdline_limit=2047,
    size=7 * MIB,
    setup_size=1024,
    memory=0x1379000,
    alignment=2 * MIB,
    text_offset=0,
    signature=Signature.none,
    config=None,
    compatible=frozenset(),
    marks=frozenset(),
    opaque="",
)
INIT_SIZE = {"6.18.15": 0x1368000, "6.19.11": 0x1371000, "7.3.4": 0x1379000}  # in their bzImages, at 0x260
NAMES = ("KHO's scratch list", "purgatory", "boot parameters", "kernel", "initrd")


def at(found: list[Placed] | NoRoom) -> dict[str, int]:
    assert isinstance(found, list), found
    return {one.segment.name: one.at for one in found}


def loaded(
    kernel: KernelImageInfo,
    initrd: int,
    scratch: Sequence[Region],
    generation: Generation = Generation.stateless,
    tree: int = 0,
) -> list[Placed] | NoRoom:
    wanted = list_segments(kernel, initrd, CMDLINE, generation, len(scratch), tree)
    assert wanted is not None
    return place_segments(wanted, scratch, PAGE)


# What kernels logged of a load with KEXEC_FILE_DEBUG, in QEMU: `segment[N]: ... mem=`, in the order of NAMES.
# purgatory took five pages each time; a page more is counted here, so it and what lies below it come out a page lower.
LOGGED = [
    ("6.18.15", [(0x3DA00000, 16), (0x37A00000, 96), (0x33A00000, 64)], 70000000,
     (0x3E9F0000, 0x3E9FB000, 0x3E9F9000, 0x3C600000, 0x3833E000)),
    ("6.19.11", [(0x3DC00000, 16), (0x36400000, 96), (0x32400000, 64)], 50000000,
     (0x3EBF0000, 0x3EBFB000, 0x3EBF9000, 0x3B000000, 0x38050000)),
    ("6.19.11", [(0x7AA00000, 20), (0x1B7800000, 40), (0x1B6000000, 24)], 25000000,
     (0x7BDF0000, 0x7BDFB000, 0x7BDF9000, 0x7AA00000, 0x1B8828000)),
    ("7.3.4", [(0x3D800000, 16), (0x37800000, 96), (0x33800000, 64)], 0,
     (0x3E7F0000, 0x3E7FB000, 0x3E7F9000, 0x3C400000)),
    ("7.3.4", [(0x3D800000, 16), (0x37800000, 96), (0x33800000, 64)], 1000000,
     (0x3E7F0000, 0x3E7FB000, 0x3E7F9000, 0x3C400000, 0x3E6FB000)),
    ("7.3.4", [(0x38C00000, 96), (0x37C00000, 16), (0x37400000, 8)], 2097152,
     (0x3EBF0000, 0x3EBFB000, 0x3EBF9000, 0x3D800000, 0x3D600000)),
    ("7.3.4", [(0x38C00000, 96), (0x37C00000, 16), (0x37400000, 8)], 60000000,
     (0x3EBF0000, 0x3EBFB000, 0x3EBF9000, 0x3D800000, 0x39EC7000)),
    ("7.3.4", [(0x58400000, 92), (0x37C00000, 276)], 20000000,
     (0x5DFF0000, 0x5DFFB000, 0x5DFF9000, 0x5CC00000, 0x5B8ED000)),
]  # fmt: skip
LARGEST = [  # bytes of the largest initrd that was taken, found by bisection: a page more was EADDRNOTAVAIL
    ("6.18.15", [(0x3DA00000, 16), (0x37A00000, 96), (0x33A00000, 64)], 79691776),
    ("6.19.11", [(0x3DC00000, 16), (0x36400000, 96), (0x32400000, 64)], 79691776),
    ("6.19.11", [(0x7AA00000, 20), (0x1B7800000, 40), (0x1B6000000, 24)], 41943040),  # the last two touch
    ("7.3.4", [(0x3D800000, 16), (0x37800000, 96), (0x33800000, 64)], 79691776),
    ("7.3.4", [(0x38C00000, 96), (0x37C00000, 16), (0x37400000, 8)], 79691776),
]


def regions(listed: Sequence[tuple[int, int]]) -> list[Region]:
    return [Region(addr, size * MIB) for addr, size in listed]


@pytest.mark.parametrize(("release", "scratch", "initrd", "logged"), LOGGED)
def test_segments_go_where_a_real_kernel_put_them(
    release: str, scratch: Sequence[tuple[int, int]], initrd: int, logged: Sequence[int]
) -> None:
    expected = dict(zip(NAMES, logged, strict=False))
    expected["purgatory"] -= PAGE
    expected["boot parameters"] -= PAGE
    assert at(loaded(replace(KERNEL, memory=INIT_SIZE[release]), initrd, regions(scratch))) == expected


@pytest.mark.parametrize(("release", "scratch", "largest"), LARGEST)
def test_the_largest_initrd_is_what_a_real_kernel_took(
    release: str, scratch: Sequence[tuple[int, int]], largest: int
) -> None:
    kernel = replace(KERNEL, memory=INIT_SIZE[release])
    assert isinstance(loaded(kernel, largest, regions(scratch)), list)
    refused = loaded(kernel, largest + 1, regions(scratch))
    assert isinstance(refused, NoRoom)
    assert (refused.segment.name, refused.segment.size, refused.hole) == ("initrd", largest + PAGE, largest)


def test_each_goes_as_high_as_it_may_and_below_what_is_there() -> None:
    wanted = [Segment("a", 0x1000, 0x10000), Segment("b", 0x1800), Segment("c", 0x10000)]
    assert at(place_segments(wanted, [Region(0x100000, 0x100000)], PAGE)) == {
        "a": 0x1F0000,  # the highest multiple of 64 KiB
        "b": 0x1FE000,  # two pages, above a
        "c": 0x1E0000,  # 13 pages are left above a
    }


def test_from_the_bottom_each_goes_as_low_as_it_may_and_above_what_is_there() -> None:
    wanted = [Segment(name, size, top_down=False) for name, size in (("a", 0x1001), ("b", 0x1000))]
    wanted.append(Segment("c", 0x1000, 0x10000, top_down=False))
    assert at(place_segments(wanted, [Region(0x101000, 0x100000)], PAGE)) == {
        "a": 0x101000,
        "b": 0x103000,
        "c": 0x110000,
    }


def test_a_region_that_has_no_hole_is_passed_over() -> None:
    scratch = [Region(0x100000, 0x2000), Region(0x40000000, 0x100000)]
    wanted = [Segment("small", 0x1000), Segment("large", 0x80000), Segment("small again", 0x1000)]
    assert at(place_segments(wanted, scratch, PAGE)) == {
        "small": 0x101000,
        "large": 0x40080000,
        "small again": 0x100000,
    }


def test_the_lowest_address_and_the_alignment_hold() -> None:
    scratch = [Region(0x100000, 0x101000)]
    assert at(place_segments([Segment("a", 0x1000, 0x200000)], scratch, PAGE)) == {"a": 0x200000}
    assert place_segments([Segment("a", 0x2000, lowest=0x200000)], scratch, PAGE) == NoRoom(
        Segment("a", 0x2000, PAGE, 0x200000), 0x1000
    )


def test_a_kernel_goes_no_lower_than_its_header_prefers() -> None:
    """bzImage64_load(): MIN_KERNEL_LOAD_ADDR (1 MiB), or the header's pref_address where that is higher."""
    scratch = [Region(2 * MIB, 40 * MIB), Region(96 * MIB, 40 * MIB)]
    for pref, expected in ((0, 20), (16 * MIB, 20), (24 * MIB, 116), (100 * MIB, 116)):
        found = at(loaded(replace(KERNEL, memory=20 * MIB, pref_address=pref), 0, scratch))
        assert found["kernel"] == expected * MIB
    refused = loaded(replace(KERNEL, memory=20 * MIB, pref_address=GIB), 0, scratch)
    assert isinstance(refused, NoRoom)
    assert (refused.segment.name, refused.segment.lowest, refused.hole) == ("kernel", GIB, 0)


def test_pages_are_the_running_kernel_s() -> None:
    wanted = [Segment("a", 1), Segment("b", 0x10001)]
    assert at(place_segments(wanted, [Region(0x100000, 0x40000)], 64 * KIB)) == {"a": 0x130000, "b": 0x110000}


def test_the_first_without_room_is_named_with_the_most_it_could_have_had() -> None:
    """Of 0x1f0000 bytes below the first, only those from the next multiple of the alignment on are of use."""
    wanted = [Segment("a", 0x10000), Segment("b", 0x1F0000, 0x100000), Segment("c", 0x1000)]
    found = place_segments(wanted, [Region(0x180000, 0x200000)], PAGE)
    assert found == NoRoom(wanted[1], 0x170000)


def test_boot_parameters_grow_with_the_command_line() -> None:
    """struct boot_params is a page; what else the loader keeps there and 64 EFI descriptors leave room in the next."""
    for cmdline, pages in ((100, 2), (2048, 3)):
        wanted = list_segments(KERNEL, 0, cmdline, Generation.stateless, 3)
        assert wanted is not None
        placed = place_segments(wanted, [Region(64 * MIB, 64 * MIB)], PAGE)
        assert isinstance(placed, list)
        assert [one.segment.size // PAGE for one in placed if one.segment.name == "boot parameters"] == [pages]


def test_v3_copies_its_tree_into_the_image_and_names_its_one_region_elsewhere() -> None:
    """kexec_kho_out.c of the series: the memory cache, then the tree, each on 64 KiB; the cache at most as large."""
    scratch = [Region(256 * MIB, 64 * MIB)]
    found = at(loaded(KERNEL, 0, scratch, Generation.sysfs, 5 * MIB))
    assert list(found.items())[:2] == [("KHO's memory cache", 315 * MIB), ("KHO's tree", 310 * MIB)]
    assert "KHO's scratch list" not in found
    unknown = at(loaded(KERNEL, 0, scratch, Generation.sysfs))
    assert (unknown["KHO's memory cache"], unknown["KHO's tree"]) == (0x13FF0000, 0x13FE0000)


ARM64 = replace(KERNEL, format="Image", arch="aarch64", memory=40 * MIB, text_offset=0)


def test_arm64_s_kernel_goes_to_the_bottom_and_all_else_above_it() -> None:
    """The device tree is counted with 2 MiB, its largest: under the scratch list, the next multiple of 2 MiB."""
    assert at(loaded(ARM64, 3 * MIB, [Region(1 * GIB, 64 * MIB)])) == {
        "KHO's scratch list": GIB + 64 * MIB - 64 * KIB,
        "kernel": GIB,
        "initrd": GIB + 40 * MIB,
        "device tree": GIB + 60 * MIB,
    }


def test_arm64_moves_the_kernel_up_where_the_rest_finds_no_room() -> None:
    """The initrd does not fit above the kernel in the first region, nor within 32 GiB of it in the second."""
    scratch = [Region(1 * GIB, 64 * MIB), Region(100 * GIB, 256 * MIB)]
    found = at(loaded(ARM64, 100 * MIB, scratch))
    assert (found["kernel"], found["initrd"]) == (100 * GIB, 100 * GIB + 40 * MIB)
    near = at(loaded(ARM64, 100 * MIB, [scratch[0], Region(32 * GIB, 256 * MIB)]))
    assert (near["kernel"], near["initrd"]) == (GIB, 32 * GIB)


def test_arm64_says_the_most_that_any_place_of_the_kernel_leaves() -> None:
    found = loaded(ARM64, 300 * MIB, [Region(1 * GIB, 64 * MIB), Region(100 * GIB, 256 * MIB)])
    assert isinstance(found, NoRoom)
    assert (found.segment.name, found.hole) == ("initrd", 216 * MIB)


def test_another_architecture_is_not_guessed() -> None:
    assert list_segments(replace(KERNEL, arch="s390x"), 0, 100, Generation.stateless, 1) is None
