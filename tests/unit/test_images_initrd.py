# SPDX-License-Identifier: LGPL-2.1-or-later
"""Initrds walked as init/initramfs.c unpacks them."""

import gzip
import lzma
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.errors import Refused
from khod.images import initrd, sealed
from khod.images.initrd import Initrd
from tests.unit.images import CPIO, PACK, bzimage, cpio

LIMIT = 64 << 20
EARLY = cpio({"kernel/x86/microcode/GenuineIntel.bin": b"microcode"})


def look(contents: bytes, limit: int = LIMIT, init: str = "init", *, last: bool = True) -> Initrd:
    with sealed.seal_pieces([contents], "/boot/initrd") as image:
        return initrd.inspect_initrd(image, limit, init, last=last)


def needs(method: str) -> frozenset[str]:
    """What usr/Kconfig calls the option."""
    return frozenset({f"CONFIG_RD_{method.upper()}"})


def refusal(contents: bytes, limit: int = LIMIT) -> Refused:
    with pytest.raises(Refused) as raised:
        look(contents, limit)
    assert raised.value.where == "/boot/initrd"
    assert raised.value.remedy
    return raised.value


def test_a_plain_archive() -> None:
    assert look(CPIO) == Initrd(("cpio",), 1, len(CPIO), True)


@pytest.mark.parametrize("method", PACK)
def test_a_compressed_archive(method: str) -> None:
    assert look(PACK[method](CPIO)) == Initrd((method,), 1, len(CPIO), True, needs=needs(method))


@pytest.mark.parametrize("method", PACK)
def test_several_archives_one_after_the_other(method: str) -> None:
    whole = EARLY + bytes(512) + PACK[method](CPIO)
    length = len(EARLY) + 512 + len(CPIO)
    assert look(whole) == Initrd(("cpio", method), 2, length, True, needs=needs(method))


@pytest.mark.parametrize("method", [method for method in PACK if method != "lz4"])
def test_after_a_compressed_archive_comes_another(method: str) -> None:
    packed = PACK[method](EARLY)
    whole = packed + bytes(-len(packed) % 4) + CPIO + PACK["gzip"](CPIO)
    assert look(whole).formats == (method, "cpio", "gzip")
    assert look(whole).files == 3


def test_archives_that_a_compressed_file_holds_are_all_walked() -> None:
    assert look(gzip.compress(EARLY + bytes(512) + CPIO)).files == 2


def test_nothing_says_where_lz4_s_legacy_frame_ends_but_zeros() -> None:
    packed = PACK["lz4"](EARLY)
    assert look(packed + bytes(512 - len(packed) % 4) + CPIO).files == 2
    refusal(packed + CPIO)


@pytest.mark.parametrize(
    ("name", "init", "found"),
    [
        ("init", "init", True),
        ("./init", "init", True),
        ("/init", "init", True),
        ("sbin/init", "init", False),
        ("usr/lib/systemd/systemd", "usr/lib/systemd/systemd", True),
        ("init.d", "init", False),
    ],
)
def test_what_will_be_started_is_looked_for(name: str, init: str, found: bool) -> None:
    assert look(cpio({name: b""}), init=init).init is found


def test_a_link_can_be_started_and_a_directory_cannot() -> None:
    assert look(cpio({"init": b"usr/lib/systemd/systemd"}, mode=0o120777)).init
    assert not look(cpio({"init": b""}, mode=0o040755)).init


def test_checksums_are_checked_where_the_archive_has_them() -> None:
    good = cpio({"init": b"contents"}, magic=b"070702")
    assert look(good).init
    assert "checksum" in refusal(good.replace(b"contents", b"content!")).what


def test_every_truncation_is_refused() -> None:
    whole = cpio({"init": b"x" * 100})
    whole = whole[: whole.rindex(b"070701")]
    assert len(whole) == 110 + len("init\0") + 1 + 100
    assert look(whole).init
    for length in range(1, len(whole)):
        assert "byte 0" in refusal(whole[:length]).what


@pytest.mark.parametrize("method", PACK)
def test_a_truncated_compressed_archive_says_where(method: str) -> None:
    packed = PACK[method](cpio({"init": os.urandom(4000)}))
    for cut in (len(packed) // 2, len(packed) - 200):
        assert "byte" in refusal(bytes(512) + packed[:cut]).what


NO_ARCHIVES = (
    *(b"0", b"07070", b"no initrd", bzimage(), b"070707" + bytes(200), bytes(100), b"070701" + b"0" * 103),
    *(b"\x04\x22\x4d\x18" + bytes(64), PACK["gzip"](b"no archive"), CPIO + b"junk", PACK["gzip"](CPIO + b"junk")),
    *(bytes(2) + CPIO, PACK["gzip"](bytes(2) + CPIO), CPIO.replace(b"0000000A", b"0000000G")),
    *(b"070701" + b" " * 104 + bytes(400), b"070701" + b"\xff" * 104, CPIO[:-4] + b"x" * 4),
    cpio({"init": b""}).replace(b"init\0", b"init!"),
)


@pytest.mark.parametrize("contents", NO_ARCHIVES)
def test_what_no_kernel_unpacks(contents: bytes) -> None:
    refusal(contents)


def test_a_bomb_stops_at_the_limit() -> None:
    bomb = gzip.compress(cpio({"init": bytes(16 << 20)}))
    error = refusal(bomb, 1 << 20)
    assert "images.max_unpacked" in error.remedy
    half = gzip.compress(cpio({"init": bytes(600 << 10)}))
    assert look(half, 1 << 20).init
    refusal(half + half, 1 << 20)


def test_what_khod_does_not_unpack_is_said() -> None:
    found = look(EARLY + b"\x89LZO\0\r\n\x1a\n")
    assert found.formats == ("cpio", "lzo")
    assert "lzo" in found.opaque
    assert found.needs == needs("lzo")
    assert not found.init


# What lib/decompress_*.c takes less of than the tools make


@pytest.mark.parametrize(("check", "name"), [(lzma.CHECK_CRC64, "CRC64"), (lzma.CHECK_SHA256, "SHA-256")])
def test_xz_with_a_check_that_kernels_do_not_know(check: int, name: str) -> None:
    """Plain `xz` writes CRC64: dec_stream_header() says XZ_OPTIONS_ERROR above CRC32."""
    error = refusal(EARLY + lzma.compress(CPIO, check=check))
    assert name in error.what
    assert "--check=crc32" in error.remedy


@pytest.mark.parametrize("check", [lzma.CHECK_NONE, lzma.CHECK_CRC32])
def test_xz_with_a_check_that_kernels_know(check: int) -> None:
    assert look(lzma.compress(CPIO, check=check)).init


@pytest.mark.parametrize(
    ("first", "option"), [(lzma.FILTER_X86, "CONFIG_XZ_DEC_X86"), (lzma.FILTER_ARM, "CONFIG_XZ_DEC_ARM")]
)
def test_xz_with_a_filter_for_code_needs_its_decoder(first: int, option: str) -> None:
    packed = lzma.compress(CPIO, check=lzma.CHECK_CRC32, filters=[{"id": first}, {"id": lzma.FILTER_LZMA2}])
    assert look(packed).needs == {"CONFIG_RD_XZ", option}


def test_xz_with_filters_that_no_kernel_has() -> None:
    lzma2 = {"id": lzma.FILTER_LZMA2}
    delta, x86 = {"id": lzma.FILTER_DELTA, "dist": 4}, {"id": lzma.FILTER_X86}
    assert "filter" in refusal(lzma.compress(CPIO, check=lzma.CHECK_CRC32, filters=[delta, lzma2])).what
    assert "filters" in refusal(lzma.compress(CPIO, check=lzma.CHECK_CRC32, filters=[x86, delta, lzma2])).what


def gzip_with(flags: int, fields: bytes) -> bytes:
    """RFC 1952: the optional fields follow the first ten bytes."""
    packed = gzip.compress(CPIO, mtime=0)
    return packed[:3] + bytes([flags]) + packed[4:10] + fields + packed[10:]


@pytest.mark.parametrize(("flags", "fields"), [(0x08, b"initrd\0"), (0x01, b"")])
def test_gzip_with_a_name_is_unpacked(flags: int, fields: bytes) -> None:
    assert look(gzip_with(flags, fields)).init


@pytest.mark.parametrize(
    ("flags", "fields", "name"), [(0x04, b"\2\0ab", "extra field"), (0x10, b"a comment\0", "comment")]
)
def test_gzip_with_fields_that_the_kernel_does_not_skip(flags: int, fields: bytes, name: str) -> None:
    """__gunzip() skips ten bytes and a name."""
    assert gzip.decompress(gzip_with(flags, fields)) == CPIO
    assert name in refusal(gzip_with(flags, fields)).what


def test_a_zstd_window_above_128_mib_is_more_than_kernels_allow() -> None:
    """RFC 8878, 3.1.1.1.2: exponent 18 is 256 MiB, 17 is 128."""
    magic, block = b"\x28\xb5\x2f\xfd\0", (len(CPIO) << 3 | 1).to_bytes(3, "little") + CPIO
    assert look(magic + bytes([17 << 3]) + block).init
    assert "256 MiB" in refusal(magic + bytes([18 << 3]) + block).what


def test_lz4_s_frame_format_is_named() -> None:
    assert "lz4 -l" in refusal(b"\x04\x22\x4d\x18" + bytes(64)).remedy


# A boot configuration at the end


def bootconfig(size: int | None = None) -> bytes:
    """Documentation/admin-guide/bootconfig.rst: the text, its size and checksum, and a magic."""
    text = b"kernel {\n  kho = on\n}\n\0"
    text += bytes(-len(text) % 4)
    return text + struct.pack("<II", len(text) if size is None else size, sum(text)) + b"#BOOTCONFIG\n"


@pytest.mark.parametrize("padding", range(4))
@pytest.mark.parametrize("archive", [CPIO, PACK["gzip"](CPIO), PACK["lz4"](CPIO), b""])
def test_a_boot_configuration_is_cut_off_first(archive: bytes, padding: int) -> None:
    """get_boot_config_from_initrd() looks three bytes back, for boot loaders that pad to four."""
    found = look(archive + bootconfig() + bytes(padding))
    assert found.bootconfig == len(bootconfig()) + padding
    assert found.init is bool(archive)
    assert found.formats == (look(archive).formats if archive else ())


def test_the_kernel_looks_for_a_boot_configuration_at_the_very_end_alone() -> None:
    with pytest.raises(Refused):
        look(CPIO + bootconfig(), last=False)
    refusal(CPIO + bootconfig() + bytes(4))
    refusal(CPIO + bootconfig(size=1 << 20))


@pytest.mark.parametrize("above", ["lib/modules", "usr/lib/modules"])
def test_whose_modules_are_in_it(above: str) -> None:
    whole = cpio({f"{above}/6.1.0-9/kernel/fs/ext4.ko": b"", f"{above}/6.1.0-8/modules.dep": b"", "init": b""})
    assert look(whole).modules == {"6.1.0-9", "6.1.0-8"}
    assert look(cpio({f"{above}/6.1.0-9": b"", "opt/lib/modules/5/x": b""})).modules == frozenset()


def test_an_entry_the_kernel_skips_is_not_counted() -> None:
    whole = cpio({"x" * 5000: b"body", "init": b""})
    assert look(whole) == Initrd(("cpio",), 1, len(whole), True)


WHOLES = [CPIO, *(EARLY + PACK[method](CPIO) for method in PACK)]


@given(st.sampled_from(WHOLES), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_damaged_initrd_is_walked_or_refused(whole: bytes, at: int, junk: bytes) -> None:
    damaged = whole[:at] + junk + whole[at + len(junk) :]
    found: object
    try:
        found = look(damaged, 1 << 20)
    except Refused as error:
        found = error
    assert isinstance(found, Initrd | Refused)
