# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which kernel an entry or a version means: trees laid out as the Boot Loader Specification and distributions do."""

import platform
from pathlib import Path

import pytest

from khoctl.boot import sources
from khoctl.boot.sources import Source
from khod.errors import Refused, UsageError
from tests.unit.images import portable

FEDORA = """\
title      Fedora 19 (Rawhide)
sort-key   fedora
machine-id 6a9857a393724b7a981ebb5b8495b9ea
version    3.8.0-2.fc19.x86_64
options    root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet
options    kho=on
# a comment
linux      /6a9857a3/3.8.0/linux
initrd     /6a9857a3/3.8.0/microcode
initrd\t/6a9857a3/3.8.0/initrd
"""


def put(root: Path, path: str, text: str = "x") -> Path:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "boot/loader/entries/fedora.conf", FEDORA)
    for name in ("linux", "microcode", "initrd"):
        put(tmp_path, f"boot/6a9857a3/3.8.0/{name}")
    return tmp_path


@pytest.mark.parametrize("wanted", ["fedora", "fedora.conf", None])
def test_a_type_1_entry(root: Path, wanted: str | None) -> None:
    found = sources.source_of_entry(wanted, root)
    assert found.kernel == root / "boot/6a9857a3/3.8.0/linux"
    assert [path.name for path in found.initrds] == ["microcode", "initrd"]
    assert found.cmdline == "root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet kho=on"
    assert "Fedora 19 (Rawhide)" in found.name


def test_a_type_2_entry_is_one_file_that_brings_everything(root: Path) -> None:
    put(root, "efi/EFI/Linux/next+3-1.efi")
    found = sources.source_of_entry("next", root)
    assert found == sources.source_of_entry("next.efi", root)
    assert (found.kernel, found.initrds, found.cmdline) == (root / "efi/EFI/Linux/next+3-1.efi", (), None)


def test_an_id_that_is_not_there_names_those_that_are(root: Path) -> None:
    with pytest.raises(UsageError) as raised:
        sources.source_of_entry("fedor", root)
    assert "fedora.conf" in raised.value.remedy


def test_the_default_is_what_the_loader_was_told(root: Path) -> None:
    put(root, "boot/loader/entries/other.conf", FEDORA.replace("Fedora 19", "Other"))
    put(root, "boot/loader/loader.conf", "timeout 3\ndefault oth*\n")
    assert "Other" in sources.source_of_entry(None, root).name
    variable = put(root, "sys/firmware/efi/efivars/LoaderEntryDefault-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
    variable.write_bytes(b"\7\0\0\0" + "fedora.conf\0".encode("utf-16-le"))
    assert "Fedora" in sources.source_of_entry(None, root).name


def test_without_a_default_the_newest_that_may_boot(root: Path) -> None:
    put(root, "boot/loader/entries/new.conf", FEDORA.replace("3.8.0-2.fc19", "3.10.0-1.fc19").replace("19 (", "new ("))
    put(root, "boot/loader/entries/bad+0-3.conf", FEDORA.replace("3.8.0-2.fc19", "4.0.0-1.fc19"))
    assert [one.id for one in sources.list_entries(root)] == ["new.conf", "fedora.conf", "bad.conf"]
    assert "new" in sources.source_of_entry(None, root).name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("/6a9857a3/3.8.0/linux", "/nowhere/linux", "/nowhere/linux"),
        ("/6a9857a3/3.8.0/linux", "/../etc/passwd", "/../etc/passwd"),
        ("linux      /6a9857a3/3.8.0/linux", "efi /EFI/shell.efi", "no kernel"),
        ("quiet", "$kernelopts", "$kernelopts"),
        ("sort-key   fedora", "architecture ia32", "ia32"),
    ],
)
def test_an_entry_that_cannot_be_booted_says_why(root: Path, old: str, new: str, said: str) -> None:
    put(root, "etc/passwd")
    put(root, "boot/loader/entries/fedora.conf", FEDORA.replace(old, new))
    with pytest.raises(Refused) as raised:
        sources.source_of_entry("fedora", root)
    assert said in raised.value.what
    assert "fedora.conf" in raised.value.where


def test_this_machine_s_architecture_is_taken(root: Path) -> None:
    ours = {"x86_64": "x64", "aarch64": "aa64"}[platform.machine()]
    put(root, "boot/loader/entries/fedora.conf", FEDORA + f"architecture {ours.upper()}\n")
    assert sources.source_of_entry("fedora", root).kernel.name == "linux"


@pytest.mark.parametrize(
    ("kernel", "initrd"),
    [
        ("boot/vmlinuz-6.12", "boot/initrd.img-6.12"),  # Debian
        ("boot/vmlinuz-6.12", "boot/initramfs-6.12.img"),  # Fedora before the specification
        ("usr/lib/modules/6.12/vmlinuz", "boot/initrd-6.12"),  # SUSE
        ("boot/vmlinuz-6.12", "boot/initrd-6.12.img"),  # Mageia
        ("boot/vmlinuz-6.12", "boot/initramfs-6.12"),  # Alpine, whose VERSION is a flavour
        ("boot/kernel-6.12", "boot/initramfs-6.12.img"),  # Gentoo
        ("usr/lib/modules/6.12/vmlinuz", "usr/lib/modules/6.12/initramfs.img"),  # ostree
    ],
)
def test_an_installed_kernel_and_its_initrd(tmp_path: Path, kernel: str, initrd: str) -> None:
    put(tmp_path, kernel)
    put(tmp_path, initrd)
    found = sources.source_of_version("6.12", tmp_path)
    assert found == Source(tmp_path / kernel, (tmp_path / initrd,), None, "kernel 6.12")
    (tmp_path / initrd).unlink()
    put(tmp_path, initrd.replace("6.12", "6.11"))
    with pytest.raises(Refused, match=r"No initrd is known to be kernel 6\.12's own") as raised:
        sources.source_of_version("6.12", tmp_path)
    assert f"--image {tmp_path / kernel}" in raised.value.remedy


def test_an_initrd_named_for_a_package_is_of_its_only_version(tmp_path: Path) -> None:
    """Arch: usr/lib/modules/VERSION/pkgbase, and one initrd for whichever version is installed."""
    put(tmp_path, "usr/lib/modules/6.15.2-arch1-1/vmlinuz")
    put(tmp_path, "usr/lib/modules/6.15.2-arch1-1/pkgbase", "linux\n")
    initrd = put(tmp_path, "boot/initramfs-linux.img")
    assert sources.source_of_version("6.15.2-arch1-1", tmp_path).initrds == (initrd,)
    put(tmp_path, "usr/lib/modules/6.15.1-arch1-1/pkgbase", "linux\n")
    with pytest.raises(Refused):
        sources.source_of_version("6.15.2-arch1-1", tmp_path)


@pytest.mark.parametrize("name", ["0123-6.17.1+3.efi", "arch-linux.efi"])
def test_a_packaged_kernel_whose_initrd_is_in_a_unified_image_means_that(tmp_path: Path, name: str) -> None:
    """kernel-install with layout=uki: by its file's name or by the version in it."""
    put(tmp_path, "usr/lib/modules/6.17.1/vmlinuz")
    sections = [(".uname", b"6.17.1")] if name.startswith("arch") else []
    image = put(tmp_path, f"boot/efi/EFI/Linux/{name}")
    image.write_bytes(portable([(".osrel", b"ID=x\nVERSION_ID=6.18\n"), *sections, (".linux", b"x")]))
    found = sources.source_of_version("6.17.1", tmp_path)
    assert (found.kernel, found.initrds) == (image, ())
    with pytest.raises(UsageError):
        sources.source_of_version("6.18", tmp_path)


def test_a_packaged_kernel_whose_initrd_an_entry_names_means_that_entry(tmp_path: Path) -> None:
    put(tmp_path, "boot/vmlinuz-6.1")
    initrd = put(tmp_path, "boot/own/initrd-of-6.1")
    put(tmp_path, "boot/loader/entries/x.conf", "linux /vmlinuz-6.1\ninitrd /own/initrd-of-6.1\noptions quiet\n")
    found = sources.source_of_version("6.1", tmp_path)
    assert found == Source(tmp_path / "boot/vmlinuz-6.1", (initrd,), "quiet", "kernel 6.1, entry x.conf")


SNAPSHOT = """version {number}@6.12.6-1-default
sort-key opensuse-microos
options rootflags=subvol=@/.snapshots/{number}/snapshot
linux /opensuse-microos/6.12.6-1-default/linux-99
initrd /opensuse-microos/6.12.6-1-default/initrd-{digest}
"""


def test_of_initrds_for_several_snapshots_one_entry_s_is_taken(tmp_path: Path) -> None:
    """openSUSE's sdbootutil: each is a whole one; the newest snapshot's entry comes first."""
    put(tmp_path, "etc/kernel/entry-token", "opensuse-microos\n")
    put(tmp_path, "usr/lib/modules/6.12.6-1-default/vmlinuz")
    directory = "boot/efi/opensuse-microos/6.12.6-1-default"
    for digest in ("1aa", "2bb", "0cc"):
        put(tmp_path, f"{directory}/initrd-{digest}")
    with pytest.raises(Refused, match="Several initrds"):
        sources.source_of_version("6.12.6-1-default", tmp_path)
    put(tmp_path, f"{directory}/linux-99")
    for number, digest in ((38, "1aa"), (47, "0cc"), (44, "2bb")):
        text = SNAPSHOT.format(number=number, digest=digest)
        put(tmp_path, f"boot/efi/loader/entries/opensuse-microos-6.12.6-1-default-{number}.conf", text)
    found = sources.source_of_version("6.12.6-1-default", tmp_path)
    assert [path.name for path in found.initrds] == ["initrd-0cc"]
    assert found.cmdline == "rootflags=subvol=@/.snapshots/47/snapshot"
    assert "default-44.conf" in found.note


@pytest.mark.parametrize("version", ["", "..", "a/b", "../6.12", "6.13"])
def test_a_version_that_is_none(tmp_path: Path, version: str) -> None:
    put(tmp_path, "usr/lib/modules/6.12/vmlinuz")
    with pytest.raises(UsageError):
        sources.source_of_version(version, tmp_path)
