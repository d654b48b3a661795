# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels and initrds: damaged as files, or within and packed again, so that only what lies deep is wrong."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from khoctl.boot.unified import left_behind, read_unified
from khod.config import Images
from khod.errors import KhoError
from khod.images import initrd, sealed
from khod.images.header import LOADS
from khod.images.kernel import UnpackedImage
from khod.kernel.formats import OutgoingFormats
from khod.model import Generation
from khod.region import Region
from khod.target.compatibility import check_compatibility
from khod.target.placement import list_segments, place_segments
from khod.target.target import Given, Request, build_target, seal_request
from tests.fuzz import corpus
from tests.fuzz.damage import Field, Order, damaged
from tests.fuzz.spoken import spoken
from tests.unit.images import PACK, bzimage, payload, portable, zboot

INITRD = "initrd"
"""What a seed's name begins with, before the machine of a kernel."""
LIMITS = (1 << 14, 1 << 20, 4 << 20)
LARGEST = 64 << 20
"""Bytes of a file."""
CHEAP = ("gzip", "zstd", "lz4")
"""The compressions that are packed again in cases: the others take longer to begin than to pack."""
WHERE = "/boot/it"
RUNNING = "BOOT_IMAGE=/boot/vmlinuz root=/dev/vda ro quiet kho=on rdinit=/bin/sh console=ttyS0"
WRITTEN = OutgoingFormats("kho-v4", {"memblock": frozenset({"memblock-v1"}), "luo": frozenset({"luo-v5"})})
SCRATCH = (Region(0x100_0000, 64 << 20), Region(0x1_0000_0000, 512 << 20))


@dataclass(frozen=True)
class Case:
    """A file, the machine it is read for ("" where it is an initrd), and what it may unpack to, in bytes."""

    data: bytes
    machine: str
    limit: int = LIMITS[-1]


SEEDS = corpus.seeds("images")


def made(number: int) -> Case:
    """The case of this number."""
    chance = Random(number)
    seed, other = chance.choice(sorted(SEEDS)), chance.choice(sorted(SEEDS))
    machine, data = machine_of(seed), damaged(SEEDS[seed], _fields(SEEDS[seed]), SEEDS[other], chance)
    if chance.random() < 0.4:
        data = _packed(data, machine, chance)
    if machine and chance.random() < 0.05:
        machine = chance.choice(sorted(LOADS))
    return Case(data, machine, chance.choice(LIMITS))


def alone(name: str, data: bytes) -> Case:
    """A file of the corpus as it is."""
    return Case(data, machine_of(name))


def machine_of(seed: str) -> str:
    """The machine that a kernel of the corpus is for; "" where it is an initrd."""
    first = seed.partition(".")[0]
    return "" if first == INITRD else first


def held(case: Case) -> str:
    """Look at a case as khod does before a handover; "" where all of it can be looked into, else what is said."""
    with sealed.seal_pieces([case.data or b"\0"], WHERE) as image:
        if not case.machine:
            try:
                initrd.inspect_initrd(image, case.limit)
            except KhoError as error:
                return spoken(error)
            return ""
        left_behind(read_unified(Path(f"/proc/self/fd/{image.fd}")), WHERE, None)
        return _taken(image.fd, case)


def _taken(fd: int, case: Case) -> str:
    request = Request(kernel=Given(fd, WHERE))
    try:
        bounds = Images(LARGEST, case.limit)
        took = build_target(seal_request(request, bounds), request, RUNNING, "run", bounds, case.machine)
    except KhoError as error:  # the command line a unified kernel image brings along
        return spoken(error)
    try:
        said = [spoken(error) for error in took.wrong.values()]
        if took.apart is not None:
            _judged(took.apart)
            said += filter(None, [took.apart.about.opaque])
        return "; ".join(said)
    finally:
        took.close()


def _judged(bundle: UnpackedImage) -> None:
    """What the checks do with what an image says of itself."""
    about = bundle.about
    assert check_compatibility(WRITTEN, about).why
    size = bundle.initrd.size if bundle.initrd else 0
    for generation in (Generation.sysfs, Generation.stateless):
        if wanted := list_segments(about, size, 100, generation, len(SCRATCH)):
            place_segments(wanted, SCRATCH)


def _packed(data: bytes, machine: str, chance: Random) -> bytes:
    """Put what was damaged into something whole, as often as not in two layers."""
    for _ in range(chance.choice((1, 1, 2))):
        method = chance.choice(CHEAP)
        match chance.randrange(5) if machine else 0:
            case 1:
                data = zboot(data, method)
            case 2:
                data = portable(
                    [(".linux", data), (".cmdline", data[: chance.choice((0, 20, 5000))]), (".osrel", data[:99])]
                )
            case 3 if len(data) < 1 << 14:
                data = bzimage.__wrapped__(size=0, contents=data, method=method)
            case 4:
                data = payload(data, method)
            case _:
                data = PACK[method](data)
    return data


def _fields(data: bytes) -> list[Field]:
    """Every number of the headers that this file has, as far as a seed's are where they should be."""
    found = list(_setup(data))
    if data[:2] == b"MZ":
        found += _portable(data)
    if data[:4] == b"\x7fELF":
        found += _elf(data)
    if data[56:60] in (b"ARM\x64", b"RSC\x05", b"\xcd\x23\x82\x81"):
        found += [Field(at, 8, "little") for at in (8, 16, 24)]
    at = data.find(b"07070")
    while at >= 0 and len(found) < 200:
        found += [Field(place, 8, "big", digits=True) for place in range(at + 6, at + 110, 8)]
        at = data.find(b"07070", at + 6)
    return found


def _setup(data: bytes) -> Iterator[Field]:
    """The numbers of x86's setup header that are looked at."""
    if data[0x202:0x206] == b"HdrS":
        for at, size in (
            (0x1F1, 1),
            (0x1F4, 4),
            (0x206, 2),
            (0x20E, 2),
            (0x211, 1),
            (0x230, 4),
            (0x234, 1),
            (0x236, 2),
            (0x238, 4),
            (0x258, 8),
        ):
            yield Field(at, size, "little")
        yield from (Field(at, 4, "little") for at in (0x248, 0x24C, 0x260))


def _portable(data: bytes) -> Iterator[Field]:
    (start,) = struct.unpack_from("<I", data, 0x3C)
    yield from (Field(at, 4, "little") for at in (0x3C, 8, 12))
    if data[start : start + 4] == b"PE\0\0":
        yield from (Field(start + at, 2, "little") for at in (4, 6, 20))
        yield from (Field(start + 24 + at, 4, "little") for at in (0, 92, 108, 124, 128, 140, 144))
        count, optional = struct.unpack_from("<H12xH", data, start + 6)
        for section in range(start + 24 + optional, start + 24 + optional + 40 * count, 40):
            yield from (Field(section + at, 4, "little") for at in (8, 12, 16, 20))


def _elf(data: bytes) -> Iterator[Field]:
    order: Order = "little" if data[5] == 1 else "big"
    sizes = ((16, 2), (18, 2), (32, 8), (40, 8), *((at, 2) for at in range(52, 64, 2)))
    yield from (Field(at, size, order) for at, size in sizes)
    yield from (Field(at, 8, order) for at in range(72, 120, 8))
    first = int.from_bytes(data[40:48], order)
    for section in range(first, len(data) - 63, 64):
        yield from (
            Field(section, 4, order),
            Field(section + 4, 4, order),
            Field(section + 24, 8, order),
            Field(section + 32, 8, order),
        )
