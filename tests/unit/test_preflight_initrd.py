# SPDX-License-Identifier: LGPL-2.1-or-later
"""The check `initrd`: what the next kernel unpacks and starts, and what could not be inspected."""

import gzip
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from khod.model import Check, CheckResult
from tests.unit.images import CPIO, PACK, bzimage, code, cpio
from tests.unit.test_images_initrd import bootconfig
from tests.unit.test_preflight import Site

KHO = "CONFIG_KEXEC_HANDOVER=y\n"
NO_ROOT, ROOT = "kho=on", "kho=on root=/dev/vda1"
LZO = b"\x89LZO\0\r\n\x1a\n" + bytes(range(200))
VERSION = "6.8.0-next"  # bzimage()'s


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for target in made.targets:
        target.close()


def judged(site: Site, *initrds: bytes, config: str | None = KHO, cmdline: str = NO_ROOT) -> Check:
    """What the check says of these initrds, with an image that shows this configuration."""
    return site.checks(site.image(bzimage(contents=code(config=config)), cmdline, initrds))["initrd"]


@pytest.mark.parametrize("check", [lzma.CHECK_CRC64, lzma.CHECK_SHA256])
def test_xz_that_no_kernel_unpacks_fails_and_says_how_to_pack(site: Site, check: int) -> None:
    """radxa/kernel#500, dkms#386: plain `xz`, and a kernel that panics without an /init."""
    found = judged(site, lzma.compress(CPIO, check=check))
    assert (found.result, "--check=crc32" in found.remedy) == (CheckResult.fail, True)
    assert judged(site, lzma.compress(CPIO, check=lzma.CHECK_CRC32)).result is CheckResult.passed


@pytest.mark.parametrize("method", PACK)
def test_what_the_next_kernel_was_built_without_fails(site: Site, method: str) -> None:
    """dracut-ng#378, openwrt#17194: `compression method xz not configured`."""
    option, packed = f"CONFIG_RD_{method.upper()}", PACK[method](CPIO)
    found = judged(site, packed, config=f"{KHO}CONFIG_BLK_DEV_INITRD=y\n# {option} is not set\n")
    assert (found.result, option in found.evidence) == (CheckResult.fail, True)
    assert judged(site, packed, config=f"{KHO}CONFIG_BLK_DEV_INITRD=y\n{option}=y\n").result is CheckResult.passed
    unseen = judged(site, packed, config=None)
    assert (unseen.result, f"not inspected: whether the kernel has {option}" in unseen.evidence) == (
        CheckResult.passed,
        True,
    )


def test_a_kernel_without_initrds_takes_none(site: Site) -> None:
    without = f"{KHO}# CONFIG_BLK_DEV_INITRD is not set\n"
    found = judged(site, CPIO, config=without)
    assert (found.result, "CONFIG_BLK_DEV_INITRD" in found.evidence) == (CheckResult.fail, True)
    assert judged(site, config=without, cmdline=ROOT).result is CheckResult.passed


@pytest.mark.parametrize("cmdline", [NO_ROOT, ROOT])
def test_lzop_is_reported_as_not_inspected(site: Site, cmdline: str) -> None:
    """armbian/build#10606: nobody looked into it, so nobody can say that there is no /init."""
    found = judged(site, LZO, cmdline=cmdline)
    assert found.result is CheckResult.warn
    assert "not inspected" in found.evidence
    assert "lzo" in found.evidence
    assert "no /init" not in found.evidence


def test_lzop_that_the_kernel_was_built_without_fails(site: Site) -> None:
    found = judged(site, LZO, config=f"{KHO}# CONFIG_RD_LZO is not set\n")
    assert (found.result, "CONFIG_RD_LZO" in found.evidence) == (CheckResult.fail, True)


@pytest.mark.parametrize("archive", [CPIO, gzip.compress(CPIO, mtime=0)], ids=["plain", "gzip"])
def test_a_boot_configuration_is_no_damage(site: Site, archive: bytes) -> None:
    """gentoo/genkernel#42 appends one to each initramfs."""
    found = judged(site, archive + bootconfig())
    assert (found.result, "boot configuration" in found.evidence) == (CheckResult.passed, True)


def test_an_initrd_that_is_a_boot_configuration_alone_is_none(site: Site) -> None:
    """bottlerocket-os/bottlerocket#3040."""
    assert judged(site, bootconfig(), cmdline=ROOT).result is CheckResult.passed
    assert judged(site, bootconfig(), cmdline=NO_ROOT).result is CheckResult.fail
    assert judged(site, CPIO, bootconfig()).result is CheckResult.passed


def test_a_root_that_a_boot_configuration_may_name_is_not_inspected(site: Site) -> None:
    """Bottlerocket's sets its root up with dm-mod.create; the kernel reads it where it is asked to."""
    early = cpio({"kernel/x86/microcode/GenuineIntel.bin": b""})
    force, without = f"{KHO}CONFIG_BOOT_CONFIG_FORCE=y\n", f"{KHO}# CONFIG_BOOT_CONFIG is not set\n"
    for archive in (b"", early):
        for root in ("root=/dev/dm-0", ""):
            found = judged(site, archive + bootconfig(), cmdline=f"kho=on bootconfig {root}")
            assert (found.result, "not inspected: the boot conf" in found.evidence) == (CheckResult.warn, True)
            forced = judged(site, archive + bootconfig(), cmdline=f"kho=on {root}", config=force)
            assert forced.result is CheckResult.warn
            for line, config in (("kho=on", KHO), ("kho=on -- bootconfig", KHO), ("kho=on bootconfig", without)):
                unread = judged(site, archive + bootconfig(), cmdline=f"{root} {line}", config=config)
                assert unread.result is CheckResult.fail
    assert judged(site, early, cmdline="kho=on bootconfig").result is CheckResult.fail


def test_a_boot_configuration_between_two_initrds_stops_the_kernel(site: Site) -> None:
    """They are joined, and it looks at the end alone."""
    assert judged(site, CPIO + bootconfig(), CPIO).result is CheckResult.fail


@pytest.mark.parametrize("initrds", [(), (cpio({"kernel/x86/microcode/GenuineIntel.bin": b""}),)])
def test_an_initramfs_in_the_image_itself_counts(site: Site, initrds: Sequence[bytes]) -> None:
    """Flatcar's kernel has one: root=LABEL=ROOT without an initrd is right there."""
    built_in = f'{KHO}CONFIG_INITRAMFS_SOURCE="bootengine.cpio"\n'
    assert judged(site, *initrds, config=built_in).result is CheckResult.passed
    assert judged(site, *initrds, config=f'{KHO}CONFIG_INITRAMFS_SOURCE=""\n').result is CheckResult.fail


def test_another_kernel_s_modules_are_warned_of_with_both_versions(site: Site) -> None:
    def initrd(*versions: str) -> bytes:
        return cpio({"init": b"", **{f"usr/lib/modules/{version}/modules.dep": b"" for version in versions}})

    found = judged(site, initrd("6.1.0-9"))
    assert found.result is CheckResult.warn
    assert "6.1.0-9" in found.evidence
    assert VERSION in found.evidence
    assert judged(site, initrd("6.1.0-9", VERSION)).result is CheckResult.passed
    assert judged(site, initrd("6.1.0-9"), initrd(VERSION)).result is CheckResult.passed
