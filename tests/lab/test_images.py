# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real images out of real packages, none booted. What is expected comes from the packages and from other tools."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pefile
import pytest

from khod.errors import Refused
from khod.images import initrd, sealed
from khod.images.kernel import Signature, UnpackedImage, unpack_image
from khod.images.sealed import Sealed
from tests.lab import kernels as lab_kernels
from tests.lab import packages
from tests.lab.process import call
from tests.unit.images import zboot

LIMIT = 1 << 30
MACHINES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "riscv64": "riscv64",
    "loong64": "loongarch64",
    "ppc64el": "ppc64le",
    "s390x": "s390x",
}
FORMATS = {
    "amd64": ("bzImage",),
    "arm64": ("Image",),
    "riscv64": ("Image",),
    "loong64": ("zboot zstd", "vmlinux.efi"),
    "ppc64el": ("vmlinux",),
    "s390x": ("Image",),
}
# Read in the kernels' sources, and in their vmlinux with strings(1).
LAB_FORMATS = {
    "6.18.15": {"kho-v1", "kho-test-v1", "memblock-v1", "reserve-mem-v1"},
    "6.19.11": {"kho-v1", "kho-test-v1", "luo-v1", "luo-session-v2", "memfd-v1", "memblock-v1", "reserve-mem-v1"},
    "7.3.4": {"kho-v4", "kho-test-v1", "luo-v5", "memblock-v1", "memfd-v2", "reserve-mem-v1"}
    | {f"liveupdate-test-flb-v{number}" for number in range(3)},
}


@contextmanager
def taken(path: Path, role: str = "image") -> Iterator[Sealed]:
    with path.open("rb") as file:
        image = sealed.seal_file(file.fileno(), role, str(path), LIMIT)
    yield image


@contextmanager
def apart(path: Path, machine: str) -> Iterator[UnpackedImage]:
    with taken(path) as image:
        bundle = unpack_image(image, machine, LIMIT)
    try:
        yield bundle
    finally:
        bundle.close()


@pytest.mark.parametrize("architecture", MACHINES)
def test_debian_s_kernels_say_what_their_packages_say(architecture: str) -> None:
    packaged = packages.find(architecture)
    with apart(packaged.vmlinuz, MACHINES[architecture]) as bundle:
        about = bundle.about
    assert bundle.formats == FORMATS[architecture]
    assert (about.arch, about.version) == (MACHINES[architecture], packaged.release)
    has_kho = "CONFIG_KEXEC_HANDOVER=y" in packaged.config.read_text()
    assert any(name.startswith("kho-v") for name in about.compatible) is has_kho
    assert "CONFIG_IKCONFIG=y" not in packaged.config.read_text()
    assert about.config is None
    assert (about.opaque == "") is (architecture != "s390x")


@pytest.mark.parametrize("architecture", packages.SIGNED)
def test_signed_and_unsigned_are_told_apart(architecture: str) -> None:
    packaged = packages.find(architecture)
    assert packaged.unsigned is not None
    for path, signature in ((packaged.vmlinuz, Signature.pe), (packaged.unsigned, Signature.none)):
        directory = pefile.PE(str(path), fast_load=True).OPTIONAL_HEADER.DATA_DIRECTORY[4]
        assert (directory.Size > 0) is (signature is Signature.pe)
        with apart(path, MACHINES[architecture]) as bundle:
            assert bundle.about.signature is signature
            assert bundle.about.version == packaged.release


@pytest.mark.parametrize("architecture", MACHINES)
def test_every_machine_but_its_own_refuses_an_image(architecture: str) -> None:
    for machine in set(MACHINES.values()) - {MACHINES[architecture]}:
        with taken(packages.find(architecture).vmlinuz) as image, image, pytest.raises(Refused) as raised:
            unpack_image(image, machine, LIMIT)
        assert MACHINES[architecture] in raised.value.what
        assert machine in raised.value.what


def test_the_memory_of_a_vmlinux_is_what_readelf_sees() -> None:
    path = packages.find("ppc64el").vmlinuz
    segments = [line.split() for line in call(["readelf", "-lW", path]).splitlines() if line.strip().startswith("LOAD")]
    spans = [(int(words[3], 16), int(words[3], 16) + int(words[5], 16)) for words in segments]
    with apart(path, "ppc64le") as bundle:
        assert bundle.about.memory == max(end for _, end in spans) - min(start for start, _ in spans)


@pytest.mark.parametrize("version", [*lab_kernels.VERSIONS, "7.3.4-signed"])
def test_the_lab_s_kernels(version: str, kernels: Callable[[str], lab_kernels.Kernel]) -> None:
    kernel = kernels(version)
    with apart(kernel.bzimage, "x86_64") as bundle:
        about = bundle.about
    assert bundle.formats == ("bzImage",)
    said = re.search(r"version (\S+)", call(["file", "--brief", kernel.bzimage]))
    assert said is not None
    assert about.version == said[1]
    assert about.compatible == LAB_FORMATS[version.removesuffix("-signed")]
    assert about.marks == frozenset()
    assert about.config is not None
    assert _settings(about.config) == _settings(kernel.config.read_text())
    assert about.signature is (Signature.pe if version.endswith("-signed") else Signature.none)
    assert about.memory == _init_size(kernel.bzimage)


def _settings(config: str) -> set[str]:
    """A configuration's lines, without the path of the key: it was built elsewhere than it lies."""
    return {line for line in config.splitlines() if not line.startswith("CONFIG_SYSTEM_TRUSTED_KEYS=")}


def _init_size(bzimage: Path) -> int:
    """Documentation/arch/x86/boot.rst: offset 0x260, four bytes."""
    return int(struct.unpack_from("<I", bzimage.read_bytes(), 0x260)[0])


@pytest.mark.parametrize("method", ["gzip", "lz4", "xz", "zstd"])
def test_a_real_kernel_in_a_zboot_image_of_each_compression(method: str, tmp_path: Path) -> None:
    inner = packages.find("arm64").vmlinuz.read_bytes()
    (tmp_path / "vmlinuz.efi").write_bytes(zboot(inner, method))
    with apart(tmp_path / "vmlinuz.efi", "aarch64") as bundle:
        assert bundle.formats == (f"zboot {method}", "Image")
        assert bytes(bundle.kernel.view()) == inner
        assert bundle.about.memory == struct.unpack_from("<Q", inner, 16)[0]


@pytest.fixture(scope="module")
def initrds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make two initrds with cpio(1): one plain, as microcode comes, and one with an init that zstd(1) packs."""
    folder = tmp_path_factory.mktemp("initrds")
    for name, path in (("early", "kernel/x86/microcode/GenuineIntel.bin"), ("main", "init"), ("main", "usr/bin/busy")):
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(os.urandom(100_001))
        call(["sh", "-ec", f'find . | cpio --quiet -o -H newc > "{folder}/{name}.cpio"'], cwd=folder / name)
    call(["zstd", "--quiet", "-19", folder / "main.cpio"])
    return [folder / "early.cpio", folder / "main.cpio.zst"]


def test_an_initrd_holds_what_cpio_lists(initrds: list[Path]) -> None:
    early, packed = initrds
    plain = packed.with_suffix("")
    for path, formats in ((early, ("cpio",)), (plain, ("cpio",)), (packed, ("zstd",))):
        listed = call(["sh", "-ec", f'cpio --quiet -t < "{path.with_suffix("") if path == packed else path}"']).split()
        with taken(path, "initrd") as image, image:
            found = initrd.inspect_initrd(image, LIMIT)
        assert (found.formats, found.files, found.init) == (formats, len(listed), "init" in listed)
        assert found.unpacked == (plain if path == packed else path).stat().st_size


def test_a_unified_image_of_ukify(initrds: list[Path], tmp_path: Path) -> None:
    packaged, (script, stub) = packages.find("amd64"), packages.ukify()
    (tmp_path / "os-release").write_text("ID=debian\nVERSION_ID=14\n")
    made = tmp_path / "it.efi"
    options = [f"--initrd={path}" for path in initrds]
    options += [f"--linux={packaged.vmlinuz}", f"--stub={stub}", f"--output={made}", "--efi-arch=x64"]
    options += ["--cmdline=root=/dev/vda kho=on", f"--os-release=@{tmp_path}/os-release"]
    call([sys.executable, script, "build", *options])
    with apart(made, "x86_64") as bundle:
        assert bundle.formats == ("UKI", "bzImage")
        assert bundle.kernel.view() == packaged.vmlinuz.read_bytes()
        assert (bundle.cmdline, bundle.uname) == ("root=/dev/vda kho=on", packaged.release)
        assert bundle.osrel.splitlines() == ["ID=debian", "VERSION_ID=14"]
        assert bundle.about.signature is Signature.pe  # of the kernel in it; the UKI itself has none
        assert bundle.initrd is not None
        sections = {each.Name.rstrip(b"\0"): each for each in pefile.PE(str(made)).sections}
        assert bundle.initrd.view() == sections[b".initrd"].get_data()[: sections[b".initrd"].Misc_VirtualSize]
        found = initrd.inspect_initrd(bundle.initrd, LIMIT)
    assert (found.formats, found.init) == (("cpio", "zstd"), True)


@pytest.mark.parametrize("tool", ["gzip", "zstd", "lz4"])
def test_a_vmlinux_that_a_command_packed(tool: str, tmp_path: Path) -> None:
    packaged = packages.find("ppc64el")
    options = {"lz4": ["-l", "-1"]}.get(tool, ["-1"])
    with (tmp_path / "vmlinux").open("wb") as file:
        subprocess.run([tool, "-q", *options, "-c", packaged.vmlinuz], check=True, stdout=file)
    with apart(tmp_path / "vmlinux", "ppc64le") as bundle:
        assert bundle.formats == (tool, "vmlinux")
        assert bundle.kernel.view() == packaged.vmlinuz.read_bytes()
        assert bundle.about.version == packaged.release


def test_a_truncated_real_image_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(packages.find("arm64").vmlinuz.read_bytes(), 1)
    (tmp_path / "Image.gz").write_bytes(whole[:-1000])
    with taken(tmp_path / "Image.gz") as image, image, pytest.raises(Refused, match="gzip"):
        unpack_image(image, "aarch64", LIMIT)
