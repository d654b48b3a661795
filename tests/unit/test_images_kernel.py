# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images taken apart: every format, every layer, and what each architecture's loader takes."""

import functools
import gc
import gzip
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.errors import Exit, KhoError, Refused
from khod.images import sealed
from khod.images.kernel import Signature, UnpackedImage, unpack_image
from khod.images.sealed import Sealed
from tests.unit.images import (
    CMDLINE_SIZE,
    CONFIG,
    CPIO,
    FORMATS,
    PACK,
    SETUP_SIZE,
    bzimage,
    code,
    flat,
    payload,
    portable,
    vmlinux,
    zboot,
)

LIMIT = 64 << 20
EM = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "loongarch64": 258, "ppc64le": 21}  # elf.h


@contextmanager
def apart(contents: bytes, machine: str = "x86_64", limit: int = LIMIT) -> Iterator[UnpackedImage]:
    """Take an image apart and close what it became; where it is refused, what was given."""
    image = sealed.seal_pieces([contents], "/boot/it")
    try:
        bundle = unpack_image(image, machine, limit)
    except BaseException:
        image.close()
        raise
    try:
        yield bundle
    finally:
        bundle.close()


def refusal(contents: bytes, machine: str = "x86_64", limit: int = LIMIT) -> Refused:
    with pytest.raises(Refused) as raised, apart(contents, machine, limit):
        pass
    assert raised.value.where == "/boot/it"
    assert raised.value.remedy
    assert raised.value.exit is Exit.refused
    return raised.value


def contents(image: Sealed | None) -> bytes:
    assert image is not None
    return bytes(image.view())


def changed(image: bytes, at: int, new: bytes) -> bytes:
    return image[:at] + new + image[at + len(new) :]


def test_a_bzimage_says_all_of_itself() -> None:
    with apart(bzimage()) as bundle:
        about = bundle.about
        assert contents(bundle.kernel) == bzimage()
    assert bundle.formats == ("bzImage",)
    assert (about.format, about.arch, about.version) == ("bzImage", "x86_64", "6.8.0-next")
    assert (about.cmdline_limit, about.size, about.setup_size) == (CMDLINE_SIZE, len(bzimage()), SETUP_SIZE)
    assert (about.memory, about.alignment, about.text_offset) == (1 << 24, 2 << 20, 0)
    assert (about.pref_address, about.relocatable, about.five_level, about.page_size) == (16 << 20, True, False, 0)
    assert about.signature is Signature.none
    assert about.config == CONFIG
    assert about.compatible == set(FORMATS)
    assert about.marks == {"dt_max"}
    assert about.opaque == ""
    assert (bundle.initrd, bundle.cmdline, bundle.osrel, bundle.uname) == (None, None, "", "")


@pytest.mark.parametrize("method", PACK)
def test_whatever_a_build_compresses_it_with_its_code_is_looked_at(method: str) -> None:
    with apart(bzimage(method=method)) as bundle:
        assert bundle.about.opaque == ""
        assert (bundle.about.config, bundle.about.compatible) == (CONFIG, frozenset(FORMATS))


def test_what_cannot_be_looked_at_says_why_and_can_still_be_loaded() -> None:
    whole = bzimage()
    lzo = changed(whole, SETUP_SIZE, b"\x89LZO")
    damaged = changed(whole, SETUP_SIZE + 20, b"damaged")
    strange = changed(whole, SETUP_SIZE, b"strange!")
    size = struct.pack("<I", len(payload(code(), "gzip")) - 4)
    for image, why in ((lzo, "lzo"), (damaged, "gzip"), (strange, "in a way"), (changed(whole, 0x24C, size), "gzip")):
        with apart(image) as bundle:
            assert why in bundle.about.opaque
            assert (bundle.about.config, bundle.about.compatible) == (None, frozenset())
            assert bundle.about.version == "6.8.0-next"
    with apart(bzimage(contents=bytes(1 << 20)), limit=1 << 19) as bundle:
        assert str(1 << 19) in bundle.about.opaque


def test_a_build_that_noted_another_size_is_not_believed() -> None:
    packed = payload(code(), "zstd")
    with apart(changed(bzimage(method="zstd"), SETUP_SIZE + len(packed) - 4, struct.pack("<I", 7))) as bundle:
        assert str(len(code())) in bundle.about.opaque


@pytest.mark.parametrize(
    ("at", "new", "what"),
    [
        (0x206, struct.pack("<H", 0x20B), "2.11"),
        (0x211, b"\0", "zImage"),
        (0x236, b"\2\0", "64-bit"),
        (0x236, b"\1\0", "4 GiB"),
        (0x1F4, struct.pack("<I", 1 << 20), "truncated"),
        (0x24C, struct.pack("<I", 1 << 20), "truncated"),
        (0x230, struct.pack("<I", 3 << 20), "0x300000, which is not a power of two"),
    ],
)
def test_what_the_loader_of_x86_refuses_is_refused_before(at: int, new: bytes, what: str) -> None:
    assert what in refusal(changed(bzimage(), at, new)).what


def test_every_truncation_of_a_bzimage_is_refused() -> None:
    whole = bzimage()
    for length in range(1, len(whole), 97):
        refusal(whole[:length])


@pytest.mark.parametrize(
    ("machine", "format_", "alignment", "offset"),
    [
        ("aarch64", "Image", 2 << 20, 0),
        ("riscv64", "Image", 0x200000, 0x200000),
        ("loongarch64", "vmlinux.efi", 2 << 20, 0x200000),
    ],
)
def test_a_flat_image_is_its_architecture_s(machine: str, format_: str, alignment: int, offset: int) -> None:
    with apart(flat(machine), machine) as bundle:
        about = bundle.about
    assert (about.format, about.arch, about.version) == (format_, machine, "6.8.0-next")
    assert (about.memory, about.alignment, about.text_offset) == (64 + len(code()) + 0x1000, alignment, offset)
    assert (about.config, about.compatible) == (CONFIG, frozenset(FORMATS))


@pytest.mark.parametrize(("bits", "size"), [(0, 0), (1, 4096), (2, 16384), (3, 65536)])
def test_an_arm64_image_says_its_page_size(bits: int, size: int) -> None:
    """Bits 1 and 2 of the flags (Documentation/arch/arm64/booting.rst)."""
    with apart(changed(flat("aarch64"), 24, struct.pack("<Q", 8 | bits << 1)), "aarch64") as bundle:
        assert bundle.about.page_size == size


def test_a_page_size_stands_in_a_configuration_too() -> None:
    for config, size in ((CONFIG, 0), (f"{CONFIG}CONFIG_PAGE_SHIFT=14\n", 16384), ("# CONFIG_PAGE_SHIFT=14\n", 0)):
        with apart(flat("loongarch64", code(config=config)), "loongarch64") as bundle:
            assert bundle.about.page_size == size


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_a_big_endian_image_is_refused(machine: str) -> None:
    assert "big-endian" in refusal(changed(flat(machine), 24, b"\1"), machine).what


def test_an_s390_image_says_what_it_can() -> None:
    image = bytearray(0x11000)
    image[0x10008:0x1000E] = b"S390EP"
    struct.pack_into(">QQ", image, 0x10428, 0x200, 4096)
    image[0x200:0x210] = b"6.12.1-s390x (b)"
    with apart(bytes(image), "s390x") as bundle:
        assert (bundle.about.arch, bundle.about.version) == ("s390x", "6.12.1-s390x")
        assert bundle.about.cmdline_limit == 4096 - 2
        assert bundle.about.opaque


@pytest.mark.parametrize("machine", ["riscv64", "loongarch64", "ppc64le"])
def test_a_vmlinux_is_taken_where_the_loader_takes_it(machine: str) -> None:
    image = vmlinux(EM[machine])
    with apart(image, machine) as bundle:
        about = bundle.about
    assert (about.format, about.arch, about.memory, about.alignment) == ("vmlinux", machine, 1 << 20, 1 << 16)
    assert (about.version, about.compatible) == ("6.8.0-next", frozenset(FORMATS))


def test_a_big_endian_vmlinux_is_s390_s() -> None:
    with apart(vmlinux(22, order=">"), "s390x") as bundle:
        assert (bundle.about.arch, bundle.about.memory) == ("s390x", 1 << 20)
    assert "ppc64," in refusal(vmlinux(21, order=">"), "ppc64le").what


@pytest.mark.parametrize(("machine", "wanted"), [("x86_64", "bzImage"), ("aarch64", "Image")])
def test_a_vmlinux_is_refused_elsewhere_with_what_to_give(machine: str, wanted: str) -> None:
    error = refusal(vmlinux(EM[machine]), machine)
    assert "vmlinux" in error.what
    assert wanted in error.remedy


def test_another_machine_s_image_is_refused_with_both_names() -> None:
    error = refusal(flat("riscv64"), "aarch64")
    assert "riscv64" in error.what
    assert "aarch64" in error.what


def test_a_vmlinux_is_searched_where_its_constants_lie() -> None:
    with apart(vmlinux(EM["ppc64le"], text=b"\0kho-v9\0"), "ppc64le") as bundle:
        assert bundle.about.compatible == set(FORMATS)


@pytest.mark.parametrize("method", PACK)
def test_an_image_in_a_compressed_file_is_unpacked(method: str) -> None:
    with apart(PACK[method](flat("aarch64")), "aarch64") as bundle:
        assert bundle.formats == (method, "Image")
        assert contents(bundle.kernel) == flat("aarch64")
        assert bundle.about.size == len(flat("aarch64"))
        assert bundle.about.compatible == set(FORMATS)
        with pytest.raises(PermissionError):
            os.ftruncate(bundle.kernel.fd, 0)


@pytest.mark.parametrize("method", PACK)
def test_an_efi_zboot_image_is_unpacked(method: str) -> None:
    with apart(zboot(flat("aarch64"), method), "aarch64") as bundle:
        assert bundle.formats == (f"zboot {method}", "Image")
        assert contents(bundle.kernel) == flat("aarch64")


def test_a_truncated_zboot_image_is_refused() -> None:
    assert "truncated" in refusal(zboot(flat("aarch64"), "zstd")[:-32], "aarch64").what


UKI = [
    (".osrel", b'ID=debian\nVERSION_ID="14"\n'),
    (".cmdline", b"root=/dev/vda kho=on \n\0"),
    (".uname", b"6.8.0-next"),
    (".initrd", CPIO + CPIO),
    (".linux", bzimage()),
]


def test_a_unified_kernel_image_gives_all_its_sections() -> None:
    with apart(portable(UKI)) as bundle:
        assert bundle.formats == ("UKI", "bzImage")
        assert contents(bundle.kernel) == bzimage()
        assert contents(bundle.initrd) == CPIO + CPIO
    assert bundle.cmdline == "root=/dev/vda kho=on"
    assert (bundle.osrel, bundle.uname) == ('ID=debian\nVERSION_ID="14"', "6.8.0-next")
    assert bundle.about.version == "6.8.0-next"


def test_one_without_initrd_and_command_line_has_none() -> None:
    with apart(portable([(".initrd", b""), (".linux", bzimage())])) as bundle:
        assert (bundle.initrd, bundle.cmdline) == (None, None)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (b"root=/dev/vda1\nquiet\tkho_scratch=512M\r\n", "root=/dev/vda1 quiet kho_scratch=512M"),
        (b"\n \x01 a\x7fb\x1b[1m  c \n\n\0", "a b [1m  c"),
        ("root=LABEL=my\u3000disk\u00a0\x85".encode(), "root=LABEL=my\u3000disk\u00a0\x85"),
        (b"a\0b", "a"),
        (b"\n", ""),
    ],
)
def test_a_command_line_of_several_lines_is_one_as_systemd_stub_makes_it(section: bytes, line: str) -> None:
    """mangle_stub_cmdline(): control characters and spaces are spaces, those at the ends go."""
    with apart(portable([(".cmdline", section), (".linux", bzimage())])) as bundle:
        assert bundle.cmdline == line


def test_a_thin_image_is_refused_with_the_files_it_names() -> None:
    """lanzaboote's: .linux and .initrd are paths, .linuxh and .initrdh their files' SHA-256."""
    paths = {".linux": rb"\EFI\nixos\kernel-6.12.efi", ".initrd": rb"\EFI\nixos\initrd-6.12.efi"}
    image = portable([*paths.items(), *((f"{name}h", bytes(32)) for name in paths)])
    refused = refusal(image)
    assert "/EFI/nixos/kernel-6.12.efi" in refused.what
    assert "`kernel.image=/EFI/nixos/kernel-6.12.efi` `kernel.initrds=/EFI/nixos/initrd-6.12.efi`" in refused.remedy


def test_microcode_comes_before_the_initrd_as_systemd_stub_does() -> None:
    with apart(portable([(".ucode", b"micro"), *UKI])) as bundle:
        assert contents(bundle.initrd) == b"micro\0\0\0" + CPIO + CPIO


def test_of_several_profiles_the_first_one_counts() -> None:
    profiles = [(".profile", b"ID=a"), (".cmdline", b"first"), (".profile", b"ID=b"), (".cmdline", b"second")]
    with apart(portable([*UKI, *profiles])) as bundle:
        assert bundle.cmdline == "first"
        assert bundle.uname == "6.8.0-next"


def test_layers_within_layers() -> None:
    image = gzip.compress(portable([(".linux", zboot(PACK["xz"](flat("aarch64")), "gzip"))], machine=0xAA64))
    with apart(image, "aarch64") as bundle:
        assert bundle.formats == ("gzip", "UKI", "zboot gzip", "xz", "Image")
    assert "within each other" in refusal(gzip.compress(image), "aarch64").what


def test_a_section_beyond_the_end_is_refused() -> None:
    whole = portable(UKI)
    for length in (100, 0x40 + 24 + 200, 600, len(whole) - 600):
        refusal(whole[:length])


def test_signatures_are_told_apart() -> None:
    table = struct.pack("<IHH", 16, 0x200, 2) + bytes(8)
    signed = portable([(".text", bytes(512))], certificates=table, machine=0xAA64)
    image = changed(flat("aarch64"), 0, b"MZ")
    at = len(image)
    image = changed(image, 0x3C, struct.pack("<I", at))
    signed = image + signed[0x40:]  # its PE header behind, with the table's offset moved
    entry = at + 24 + 112 + 8 * 4
    signed = changed(signed, entry, struct.pack("<II", len(signed) - 16, 16))
    with apart(signed, "aarch64") as bundle:
        assert bundle.about.signature is Signature.pe
    assert "certificate" in refusal(changed(signed, entry, struct.pack("<II", len(signed) - 8, 16)), "aarch64").what
    with apart(bzimage() + b"~Module signature appended~\n") as bundle:
        assert bundle.about.signature is Signature.appended


NO_KERNELS = {
    "an ELF file of nothing": b"\x7fELF\x02\x01" + bytes(0x4000),
    "gzip of zeroes": gzip.compress(bytes(0x4000)),
    "MZ": b"MZ" + bytes(0x4000),
    "zeroes": bytes(0x4000),
    "HdrS without boot_flag": bytes(0x202) + b"HdrS" + bytes(0x4000),
    "boot_flag without HdrS": bytes(0x1FE) + b"\x55\xaa" + bytes(0x4000),
    "an initrd": CPIO,
    "gzip of nothing": gzip.compress(b""),
    "one byte": b"M",
}


@pytest.mark.parametrize("name", NO_KERNELS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x", "ppc64le", "mips"])
def test_what_is_no_kernel(name: str, machine: str) -> None:
    refusal(NO_KERNELS[name], machine)


@pytest.mark.parametrize("method", PACK)
def test_a_decompression_bomb_stops_at_the_limit(method: str) -> None:
    bomb = PACK[method](bytes(16 << 20))
    error = refusal(bomb, "aarch64", 1 << 20)
    assert str(1 << 20) in error.what
    assert "images.max_unpacked" in error.remedy


@pytest.mark.parametrize("method", PACK)
def test_a_compressed_image_that_is_cut_or_damaged_is_refused(method: str) -> None:
    packed = PACK[method](bytes(range(256)) * 16 + flat("aarch64"))
    for length in range(len(packed) // 8, len(packed) - 1, max(len(packed) // 16, 1)):
        refusal(packed[:length], "aarch64")


def test_nothing_is_left_open() -> None:
    gc.collect()  # what the errors of other tests still hold
    before = len(os.listdir("/proc/self/fd"))
    for image in (bzimage(), portable(UKI), zboot(bzimage(), "zstd")):
        with apart(image):
            pass
    for image in (*NO_KERNELS.values(), gzip.compress(portable([(".linux", b"nothing")])), portable(UKI)[:-3000]):
        refusal(image)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("strings", "known"),
    [
        (b"\0kho-v4\0luo-v5\0", {"kho-v4", "luo-v5"}),
        (b"\xff\xff\xff\xffmemfd-v2\0\0\0", {"memfd-v2"}),  # in a struct, behind a pointer
        (b"\0xkho-v2\0", {"xkho-v2", "kho-v2"}),  # kho-v2 has no other place once the linker has merged them
        (b"\0Some text about luo-v1\0", {"luo-v1"}),
        (b"\x004-v1\0%s-v1\0-v1\0SHA256-v1\0", set()),
        (b"\0kho-v1x\0kho-v\0kho-1\0kho_v1\0", set()),
        (b"\0arm,gic-v3\0ftrace,cpu-v1\0", set()),
        (b"\0ftrace-v1\0ftrace,cpu-v1\0arm,gic-v3\0", {"ftrace-v1", "ftrace,cpu-v1"}),
    ],
)
def test_formats_are_told_from_other_strings(strings: bytes, known: set[str]) -> None:
    with apart(bzimage(contents=b"\x90" * 64 + strings)) as bundle:
        assert bundle.about.compatible == known


@pytest.mark.parametrize("shift", range(-16, 17, 4))
def test_a_string_is_found_wherever_it_lies(shift: int) -> None:
    for step in (1 << 20, 4 << 20, 8 << 20):  # the bounds of pieces, and of what is looked at together
        held = bytes(step + shift) + b"\0memblock-v1\0dt_max\0" + bytes(64)
        with apart(bzimage(contents=held, method="lz4")) as bundle:
            assert bundle.about.compatible == {"memblock-v1"}
            assert bundle.about.marks == {"dt_max"}


def test_more_versions_than_a_kernel_has_are_not_all_looked_at() -> None:
    with apart(bzimage(contents=b"-v1\0" * 200_000)) as bundle:
        assert "versions" in bundle.about.opaque


def test_a_damaged_configuration_is_none() -> None:
    for held in (b"IKCFG_ST\x1f\x8b\x08damaged", code()[:-40]):
        with apart(bzimage(contents=held)) as bundle:
            assert (bundle.about.config, bundle.about.opaque) == (None, "")


WHOLE = {
    "x86_64": [bzimage(), portable(UKI)],
    "aarch64": [zboot(flat("aarch64"), method) for method in PACK],
    "ppc64le": [vmlinux(21), gzip.compress(vmlinux(21))],
}


@functools.cache
def wholes() -> list[tuple[str, bytes]]:
    return [(machine, image) for machine, images in WHOLE.items() for image in images]


@given(st.sampled_from(wholes()), st.lists(st.tuples(st.integers(0, 0x400), st.binary(min_size=1, max_size=8))))
def test_a_damaged_image_is_taken_or_refused(whole: tuple[str, bytes], damages: list[tuple[int, bytes]]) -> None:
    machine, image = whole
    for at, junk in damages:
        image = changed(image, at, junk)
    found: object
    try:
        with apart(image, machine, 1 << 20) as bundle:
            found = bundle
    except KhoError as error:
        found = error
    assert isinstance(found, UnpackedImage | Refused)
