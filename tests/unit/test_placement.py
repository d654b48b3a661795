"""Where the loader puts its segments: layouts worked out by hand from the kernel's rules."""

from dataclasses import replace

import pytest

from khod.images.kernel import Kernel, Signature
from khod.kernel.placement import NoRoom, Placed, Segment, place, segments
from khod.model import Generation, Region

MIB = 1 << 20
KERNEL = Kernel(
    "bzImage",
    "x86_64",
    "next",
    2047,
    7 * MIB,
    1024,
    0x1379000,  # init_size of the lab's 7.3.4
    0x200000,
    0,
    Signature.none,
    None,
    frozenset(),
    frozenset(),
    "",
)


def at(found: list[Placed] | NoRoom) -> dict[str, int]:
    assert isinstance(found, list), found
    return {one.segment.name: one.at for one in found}


def test_each_goes_as_high_as_it_may_and_below_what_is_there() -> None:
    wanted = [Segment("a", 0x1000, 0x10000), Segment("b", 0x1800), Segment("c", 0x1000)]
    assert at(place(wanted, [Region(0x100000, 0x100000)])) == {
        "a": 0x1F0000,  # the highest multiple of 64 KiB
        "b": 0x1FE000,  # two pages, above a
        "c": 0x1FD000,
    }


def test_a_region_that_has_no_hole_is_passed_over() -> None:
    scratch = [Region(0x100000, 0x2000), Region(0x40000000, 0x100000)]
    wanted = [Segment("small", 0x1000), Segment("large", 0x80000), Segment("small again", 0x1000)]
    assert at(place(wanted, scratch)) == {"small": 0x101000, "large": 0x40080000, "small again": 0x100000}


def test_the_lowest_address_and_the_alignment_hold() -> None:
    assert isinstance(place([Segment("a", 0x1000, lowest=0x200000)], [Region(0x100000, 0x100000)]), NoRoom)
    assert isinstance(place([Segment("a", 0x1000, 0x200000)], [Region(0x100000, 0x100000)]), NoRoom)
    assert at(place([Segment("a", 0x1000, 0x200000)], [Region(0x100000, 0x101000)])) == {"a": 0x200000}


def test_the_first_without_room_is_named_with_the_largest_hole() -> None:
    wanted = [Segment("kernel", 0x80000, 0x80000), Segment("initrd", 0x90000)]
    found = place(wanted, [Region(0x100000, 0x100000)])
    assert isinstance(found, NoRoom)
    assert found.segment.name == "initrd"
    assert found.hole == 0x80000


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-4096, False)])
def test_an_initrd_fits_to_the_page(spare: int, fits: bool) -> None:
    scratch = [Region(0x10000000, 64 * MIB)]
    others = segments(KERNEL, 0, 100, Generation.stateless, 1)
    assert others is not None
    found = at(place(others, scratch))
    room = min(found.values()) - scratch[0].addr  # all of it lies together at the top
    wanted = segments(KERNEL, room - spare, 100, Generation.stateless, 1)
    assert wanted is not None
    assert isinstance(place(wanted, scratch), list) is fits


def test_v3_copies_its_tree_into_the_image() -> None:
    wanted = segments(KERNEL, 0, 100, Generation.sysfs, 1, 5 * MIB)
    assert wanted is not None
    assert sum(one.size == 5 * MIB for one in wanted) == 2


def test_another_architecture_is_not_guessed() -> None:
    assert segments(replace(KERNEL, arch="s390x"), 0, 100, Generation.stateless, 1) is None
