# SPDX-License-Identifier: LGPL-2.1-or-later
"""State trees: damaged as bytes, or token by token, so that the header is right and what is wrong lies deep."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import libfdt

from khod.abi import fdt
from khod.abi.fdt import FDT_BEGIN_NODE, FDT_END, FDT_END_NODE, FDT_NOP, FDT_PROP, HEADER, MAGIC, PROP, U32
from khod.errors import MalformedTree, UsageError
from khod.trees.as_json import tree_as_json
from khod.trees.blobs import METADATA, open_blob
from khod.trees.difference import compare_blobs, format_difference
from khod.trees.draw import draw_summary
from khod.trees.kinds import ANYWHERE, CHILDREN, FAMILIES
from khod.trees.show import show_blobs
from khod.trees.source import compile_tree, write_dts
from khod.trees.summary import summarise_tree
from khod.trees.validate import load_schemas, validate_blobs
from tests.fuzz import corpus
from tests.fuzz.damage import Field, damaged, edge
from tests.fuzz.spoken import spoken

KEYS = sorted({*ANYWHERE, *(key for table in (FAMILIES, CHILDREN) for keys in table.values() for key in keys), "name"})
KNOWN = load_schemas(())
COMPATIBLE = sorted(KNOWN.keys() | {"kho-v0", "", "-v1", "a" * 1024})
ODD_NAMES = (b"", b"/", b"a/b", b"..", b"\xff\xfe", b"\x1b[2J", "n\u00e4me\u202e".encode(), b"x" * 1024, b"x" * 1025)
WHERE = "/a/tree"
VALIDATED = 8
"""One in so many is held against the schemas, which takes longer than all the rest together."""


@dataclass(frozen=True)
class Token:
    """One piece of a structure block: a node's name is in `name`, as is a property's, with its bytes in `value`."""

    kind: int
    name: bytes = b""
    value: bytes = b""


@dataclass(frozen=True)
class Case:
    """A blob and its name in the tree, the whole one it is compared with, and whether schemas are asked."""

    blob: bytes
    name: str = ""
    other: bytes = b""
    validated: bool = True


SEEDS = corpus.seeds("trees")


def made(number: int) -> Case:
    """The case of this number."""
    chance = Random(number)
    seed, other = chance.choice(sorted(SEEDS)), chance.choice(sorted(SEEDS))
    data = SEEDS[seed]
    if data[:4] == U32.pack(MAGIC) and chance.random() < 0.6:
        tokens = list(_tokens(data))
        for _ in range(chance.choice((1, 1, 2, 3))):
            _rearranged(tokens, chance)
        data = _together(tokens, chance)
        if chance.random() < 0.3:
            data = damaged(data, _fields(data), SEEDS[other], chance)
    else:
        data = damaged(data, _fields(data), SEEDS[other], chance)
    return Case(data, named(seed), SEEDS[seed], number % VALIDATED == 0)


def alone(name: str, data: bytes) -> Case:
    """A file of the corpus as it is, held against a whole one."""
    return Case(data, named(name), SEEDS["v3.dtb"])


def named(seed: str) -> str:
    """The blob's name that a file of the corpus is for, the root's where it has none."""
    return next((name for name in (METADATA, "luo-ser") if seed.startswith(name)), "")


def held(case: Case) -> str:
    """Read a case in every way there is; "" where it is a tree, else what is said of it."""
    blobs = {case.name: case.blob}
    shown = [*show_blobs(blobs), *draw_summary(summarise_tree(blobs, width=20), blobs)]
    json.dumps(tree_as_json(blobs)).encode()
    for found in compare_blobs({case.name: case.other}, blobs):
        shown += format_difference(found)
    if case.validated:
        shown += map(str, validate_blobs(blobs, KNOWN))
    bad = next((line for line in shown if not line.isprintable()), "")
    assert not bad, f"this must not go to a terminal: {bad!r}"
    try:
        root = open_blob(case.name, case.blob)
    except MalformedTree as error:
        return spoken(error)
    if case.blob.startswith(U32.pack(MAGIC)):
        _as_fdt(case.blob)
    for _path, node in root.walk():
        try:
            fdt.decode_mem(node)
        except MalformedTree as error:
            spoken(error)
    return ""


def _as_fdt(blob: bytes) -> None:
    """What dtc would make of it is the same tree, and libfdt takes what we take."""
    whole = fdt.read_fdt(blob, WHERE)
    try:
        write_dts(blob, WHERE)
    except UsageError as error:
        if spoken(error).startswith("The properties have more than"):
            return
    again = fdt.read_fdt(compile_tree(whole), WHERE)
    assert (again.root, again.reservations) == (whole.root, whole.reservations), "dtc's layout is another tree"
    if U32.pack(FDT_NOP) + U32.pack(FDT_END) not in blob:  # which libfdt alone takes for damage, just there
        assert libfdt.fdt_check_full(bytearray(blob), len(blob)) == 0, "libfdt refuses it"


def _tokens(data: bytes) -> Iterator[Token]:
    """The tokens of a whole tree."""
    header = HEADER.unpack_from(data)
    at, names = header[2], header[3]
    while True:
        (kind,) = U32.unpack_from(data, at)
        at += U32.size
        if kind == FDT_BEGIN_NODE:
            name = data[at : data.index(0, at)]
            yield Token(kind, name)
            at += len(name) + 4 & ~3
        elif kind == FDT_PROP:
            length, offset = PROP.unpack_from(data, at)
            value = data[at + PROP.size : at + PROP.size + length]
            yield Token(kind, data[names + offset : data.index(0, names + offset)], value)
            at += PROP.size + (length + 3 & ~3)
        else:
            yield Token(kind)
            if kind == FDT_END:
                return


def _rearranged(tokens: list[Token], chance: Random) -> None:
    """Change a token, or where some of them stand."""
    at, to = sorted((chance.randrange(len(tokens)), chance.randrange(len(tokens))))
    token = tokens[at]
    match chance.randrange(10):
        case 0:
            tokens.insert(at, Token(chance.choice((FDT_NOP, FDT_END_NODE, FDT_END, FDT_BEGIN_NODE, 0, 5))))
        case 1:
            del tokens[at : at + chance.choice((1, 1, 2, to - at))]
            tokens.append(Token(FDT_END))
        case 2:
            tokens[at:at] = tokens[at:to][:100]
        case 3:
            tokens[at], tokens[to] = tokens[to], token
        case 4:
            deep = chance.choice((2, 60, 63, 64, 65, 200))
            tokens[at:at] = [*[Token(FDT_BEGIN_NODE, b"n")] * deep, *[Token(FDT_END_NODE)] * deep]
        case 5:
            tokens[at] = Token(token.kind, chance.choice(ODD_NAMES), token.value)
        case 6:
            tokens[at] = Token(token.kind, chance.choice(KEYS).encode(), token.value)
        case 7:
            tokens.insert(at, Token(FDT_PROP, b"compatible", chance.choice(COMPATIBLE).encode() + b"\0"))
        case 8:
            tokens.insert(at, Token(FDT_PROP, chance.choice(KEYS).encode(), _value(chance)))
        case _:
            tokens[at] = Token(token.kind, token.name, _value(chance) if token.kind == FDT_PROP else token.value)
    del tokens[4000:]


def _value(chance: Random) -> bytes:
    """A property's bytes: numbers from the edges, ranges over each other or past the end, strings that are none."""
    match chance.randrange(6):
        case 0:
            return chance.randbytes(chance.choice((0, 1, 3, 4, 7, 8, 15, 16, 17, 32, 4096)))
        case 1:
            return struct.pack("=I", edge(4, 0, chance))
        case 2:
            return struct.pack("=Q", edge(8, 0, chance))
        case 3:
            return chance.choice(
                (b"a\0b\0", b"\0", b"a", b"a\0\0", b"\x1b[31m\0", b"\xc3\x28\0", b'"\\\0', b"%s\0" * 50)
            )
        case _:
            return struct.pack("=16Q", *(edge(8, 0, chance) for _ in range(16)))[: 16 * chance.randrange(1, 9)]


def _together(tokens: list[Token], chance: Random) -> bytes:
    """A blob of these tokens with a header that fits, of either version read."""
    names, block = bytearray(), bytearray()
    for token in tokens:
        block += U32.pack(token.kind)
        if token.kind == FDT_BEGIN_NODE:
            block += token.name + bytes(4 - len(token.name) % 4)
        elif token.kind == FDT_PROP:
            if (at := names.find(token.name + b"\0")) < 0:
                at = len(names)
                names += token.name + b"\0"
            block += PROP.pack(len(token.value), at) + token.value + bytes(-len(token.value) % 4)
    reserved = b"".join(struct.pack(">QQ", edge(8, 0, chance), 1) for _ in range(chance.choice((0, 0, 0, 2)))) + bytes(
        16
    )
    start = 40 + len(reserved)
    end, version = start + len(block), chance.choice((16, 17, 17, 17))
    total, length = end + len(names), len(block) if version > 16 else 0
    header = HEADER.pack(MAGIC, total, start, end, 40, version, 16, edge(4, 0, chance), len(names), length)
    return header + reserved + block + names


def _fields(data: bytes) -> list[Field]:
    """The header's numbers, and behind whatever may be a property's token its length and the offset of its name."""
    found = [Field(at, 4, "big") for at in range(0, HEADER.size, 4)]
    at = data.find(b"\0\0\0\3", HEADER.size)
    while at >= 0 and len(found) < 100:
        found += [Field(at, 4, "big"), Field(at + 4, 4, "big"), Field(at + 8, 4, "big")]
        at = data.find(b"\0\0\0\3", at + 4)
    return found
