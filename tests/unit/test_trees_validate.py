# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees held against schemas: ours take what the kernels write and nothing else; the operator's own win."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from khod.errors import ConfigError
from khod.trees.validate import PACKAGED_SCHEMAS, load_schemas, validate_blobs
from tests.unit.trees import (
    KEXEC_METADATA,
    KHO_TEST,
    LUO_V1,
    LUO_V5,
    PAGE,
    U32,
    compatible,
    fdt,
    ftrace,
    kho_v1,
    kho_v4,
    mem,
    memblock,
    memfd,
)

WRITTEN = [  # what the kernels write, by the sources
    ("", kho_v1(memblock=PAGE)),
    ("", kho_v1()),
    ("", kho_v4(memblock=(PAGE, 141))),
    ("", kho_v4(memblock=(PAGE, 141)).replace(b"kho-v4", b"kho-v3")),
    ("", ftrace([mem((64, 64), (PAGE, PAGE)), b""])),
    ("", fdt(compatible("kho-v1"))),
    ("memblock", memblock(trace=(PAGE, PAGE))),
    ("memblock", memblock()),
    ("LUO", LUO_V1),
    ("LUO", LUO_V5),
    ("kexec-metadata", KEXEC_METADATA),
    ("kho_test", KHO_TEST),
    ("memfd", memfd(2)),
    ("memfd", memfd(1)),
]
OTHERWISE = [  # (blob's name, blob, where, what is said)
    ("", kho_v4(memblock=(0, 141)), "root:/: memblock/preserved-data", "must be at least 1, is 0"),
    ("", kho_v1(memblock=PAGE + 1), "root:/: memblock/fdt", "must be a multiple of 4096, is 4097"),
    ("", fdt(compatible("kho-v4")), "root:/", "missing property: preserved-memory-map"),
    (
        "",
        fdt(compatible("kho-v4") | {"preserved-memory-map": U32(0)}),
        "root:/",
        "preserved-memory-map: malformed: 00 00 00 00",
    ),
    ("", ftrace([mem((0, PAGE))[:-1]]), "cpu0: mem", "malformed: 00 00"),
    ("", ftrace([mem((0, PAGE))]), "cpu0: mem/ranges", "must be a multiple of 2, is 1"),
    ("", ftrace([], events=b"123"), "/ftrace", "events: malformed: 31 32 33"),
    ("memblock", memblock(trace=(PAGE, 0)), "/trace", "size: must be at least 1, is 0"),
    ("memfd", memfd(1, seals=U32(0)), "memfd:/", "unexpected property: seals"),
    ("kexec-metadata", KEXEC_METADATA[:-1], "kexec-metadata:/", "neither an FDT nor a structure we know"),
    ("kho_test", KHO_TEST.replace(U32(0x4B484F21), U32(1)), "kho_test:/", "must be 1263030049, is 1"),
    ("", b"no tree at all", "root:/", "magic"),
    ("", fdt({}), "root:/: compatible", "missing"),
]


@pytest.fixture(scope="module")
def known() -> Mapping[str, Any]:
    return load_schemas(())


def test_every_compatible_is_written_by_a_test(known: Mapping[str, Any]) -> None:
    words = b" ".join(blob for _name, blob in WRITTEN) + b" ".join(name.encode() for name, _blob in WRITTEN)
    assert {name for name in known if name.encode() not in words} == {"kho-v2", "luo-session-v1"}


@pytest.mark.parametrize(("name", "blob"), WRITTEN)
def test_what_a_kernel_writes_fits(name: str, blob: bytes, known: Mapping[str, Any]) -> None:
    assert [str(found) for found in validate_blobs({name: blob}, known) if not found.fits] == []


@pytest.mark.parametrize(("name", "blob", "where", "said"), OTHERWISE)
def test_what_no_kernel_writes_does_not(
    name: str, blob: bytes, where: str, said: str, known: Mapping[str, Any]
) -> None:
    found = [str(one) for one in validate_blobs({name: blob}, known) if not one.fits]
    assert any(where in one and said in one for one in found), found


def test_a_root_of_a_producer_s_own_may_do_without_a_compatible(known: Mapping[str, Any]) -> None:
    (found,) = validate_blobs({"other": fdt({})}, known)
    assert found.fits
    assert str(found).startswith("other:/: compatible: missing")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"odd": {"type": ["string", "array"]}}, "odd: must be a text or a list, is 7"),
        ({"odd": {"enum": [1, 2]}}, "odd: must be one of [1, 2], is 7"),
        ({"odd": {"exclusiveMaximum": 7}}, "odd: must be less than 7, is 7"),
        ({"odd": {"not": {}}}, "odd: does not fit the schema: not {}"),
        ({"compatible": {"maxItems": 0}}, "compatible: must have at most 0, has 1"),
        ({"compatible": {"items": {"pattern": "x$"}}}, 'compatible/0: must be a text like "x$", is "mine-v1"'),
    ],
)
def test_what_does_not_fit_is_said_in_our_words(tmp_path: Path, schema: Mapping[str, Any], said: str) -> None:
    (tmp_path / "mine-v1.json").write_text(json.dumps({"properties": {"properties": {"properties": schema}}}))
    (found,) = validate_blobs({"x": fdt(compatible("mine-v1") | {"odd": U32(7)})}, load_schemas((tmp_path,)))
    assert str(found) == f"x:/: {said}"


def test_malformed_bytes_are_said_once(known: Mapping[str, Any]) -> None:
    assert len([*validate_blobs({"": ftrace([mem((0, PAGE))[:-1]])}, known)]) == 1


def test_a_compatible_without_a_schema_is_only_said(known: Mapping[str, Any]) -> None:
    (found,) = validate_blobs({"other": fdt(compatible("other-v1"))}, known)
    assert found.fits
    assert "no schema for other-v1" in str(found)


def test_the_operator_s_own_schema_wins(tmp_path: Path) -> None:
    (tmp_path / "other-v1.json").write_text(json.dumps({"properties": {"children": {"minProperties": 1}}}))
    (tmp_path / "memblock-v1.json").write_text("{}")
    mine = load_schemas((tmp_path, tmp_path / "nowhere"))
    (found,) = validate_blobs({"other": fdt(compatible("other-v1"))}, mine)
    assert not found.fits
    assert not list(validate_blobs({"memblock": fdt(compatible("memblock-v1") | {"odd": b"1"})}, mine))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "bad.json:1"),
        ('{\n  "type": 7\n}', "/type"),
        ("", "bad.json:1"),
        ('{"$ref": "https://example.org/x.json"}', "bad.json"),
        ('{"properties": {"name": {"pattern": "("}}}', "bad.json"),
    ],
)
def test_what_is_no_schema_is_named_with_its_place(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        list(validate_blobs({"x": fdt(compatible("bad"))}, load_schemas((tmp_path,))))
    assert where in str(caught.value)


def test_each_of_ours_says_where_it_was_read() -> None:
    for path in PACKAGED_SCHEMAS.glob("*.json"):
        text = json.loads(path.read_text())
        assert text["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert text["$comment"], path


def test_a_root_that_is_cut_off_is_let_pass_only_where_debugfs_may_have_cut_it(known: Mapping[str, Any]) -> None:
    cut = {"": kho_v4(memblock=(PAGE, 141))[:-20]}
    assert [found.fits for found in validate_blobs(cut, known)] == [False]
    assert [found.fits for found in validate_blobs(cut, known, shortened=True)] == [True]
    assert [found.fits for found in validate_blobs({"": b"no tree"}, known, shortened=True)] == [False]
