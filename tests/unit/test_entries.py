"""Boot loader entries in the specification's order, the loader's default among them, and GRUB's variables."""

import struct
from pathlib import Path

import pytest

from khoctl import sources
from khod.errors import Refused, UsageError

EFIVARS = "sys/firmware/efi/efivars"
VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
FEDORA = """\
title Fedora Linux (6.12) 41
version 6.12
linux /boot/vmlinuz-6.12
initrd /boot/initramfs-6.12.img $tuned_initrd
options root=UUID=1 ro $kernelopts ${tuned_params} quiet
grub_users $grub_users
grub_class fedora
"""


def put(root: Path, path: str, text: str = "x") -> Path:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


def add(root: Path, name: str, text: str = "", partition: str = "boot") -> None:
    put(root, f"{partition}/linux")
    put(root, f"{partition}/loader/entries/{name}", f"linux /linux\n{text}")


def variable(root: Path, name: str, value: str) -> None:
    """As efivarfs shows it: 4 bytes of attributes, then UTF-16LE with a NUL (Boot Loader Interface)."""
    put(root, f"{EFIVARS}/{name}-{VENDOR}").write_bytes(b"\7\0\0\0" + f"{value}\0".encode("utf-16-le"))


def ids(root: Path) -> list[str]:
    return [one.id for one in sources.entries(root)]


def default(root: Path) -> str:
    return sources.entry(None, root).name.split()[1]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("a.conf", "sort-key x"), ("b+0-3.conf", "sort-key a")),  # rule 1: a bad one is later than all others
        (("a+1-2.conf", "sort-key x"), ("b.conf", "sort-key y")),  # an indeterminate one is not bad
        (("a.conf", "sort-key A"), ("b.conf", "sort-key a")),  # rule 2: as strcmp(3) has it
        (("a.conf", "sort-key x"), ("b.conf", "sort-key x\nmachine-id 0")),  # one that is not set compares lower
        (("a.conf", "sort-key x\nmachine-id 0"), ("b.conf", "sort-key x\nmachine-id 1\nversion 9")),
        (("a.conf", "sort-key x\nversion 6.10"), ("b.conf", "sort-key x\nversion 6.9")),
        (("a.conf", "sort-key x\nversion 6.10"), ("b.conf", "sort-key x\nversion 6.10~rc1")),
        (("a.conf", "sort-key z"), ("b.conf", "version 9")),  # rule 3
        (("k-6.10.conf", "version 1\nmachine-id 1"), ("k-6.9.conf", "version 2\nmachine-id 0")),  # rule 4
        (("b.conf", "sort-key x\nversion 1"), ("a.conf", "sort-key x\nversion 1")),
        (("a+0-1.conf", ""), ("a+0-2.conf", "")),  # sorted by n
    ],
)
def test_the_order(tmp_path: Path, first: tuple[str, str], then: tuple[str, str]) -> None:
    for name, text in (then, first):
        add(tmp_path, name, text)
    assert [one.path.name for one in sources.entries(tmp_path)] == [first[0], then[0]]


def test_both_partitions_count_and_a_link_is_not_a_second_one(tmp_path: Path) -> None:
    add(tmp_path, "a.conf")
    add(tmp_path, "b.conf", partition="boot/efi")
    add(tmp_path, "a.conf", "title on the ESP", partition="boot/efi")
    (tmp_path / "efi").symlink_to("boot/efi")
    assert ids(tmp_path) == ["b.conf", "a.conf", "a.conf"]
    assert sources.entry("a", tmp_path).kernel == tmp_path / "boot/linux"


def test_other_files_are_no_entries(tmp_path: Path) -> None:
    add(tmp_path, "a.conf")
    for name in ("a.conf.old", ".b.conf", "README", "c.efi"):
        put(tmp_path, f"boot/loader/entries/{name}")
    (tmp_path / "boot/loader/entries/d.conf").mkdir()
    assert ids(tmp_path) == ["a.conf"]


def test_lines_end_at_newlines_only_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    add(
        tmp_path,
        "a.conf",
        "  # title commented\n\ttitle\tA \x0c B  \t\nunknown key\ntitle\n  title Last\noptions\ta  b \n",
    )
    (found,) = sources.entries(tmp_path)
    assert [field.value for field in found.fields if field.key == "title"] == ["A \x0c B", "", "Last"]
    assert found.text("title") == "Last"
    assert sources.entry("a", tmp_path).cmdline == "a  b"


def uki(root: Path, name: str, osrel: bytes) -> None:
    """The least of a PE file (PE format): e_lfanew at 0x3c, COFF header, no optional header, one section."""
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 0, 0)
    section = struct.pack("<8sIIIIIIHHI", b".osrel", len(osrel), 0x1000, 512, 512, 0, 0, 0, 0, 0)
    data = (header + coff + section).ljust(512, b"\0") + osrel.ljust(512, b"\0")
    put(root, f"boot/EFI/Linux/{name}").write_bytes(data)


def test_a_uki_sorts_by_its_os_release(tmp_path: Path) -> None:
    uki(tmp_path, "a+3.efi", b'ID=debian\nPRETTY_NAME="Debian GNU/Linux 13"\nVERSION_ID="13"\n')
    uki(tmp_path, "b.efi", b"ID=fedora\nVERSION_ID=41\n")
    add(tmp_path, "c.conf", "sort-key e")
    assert ids(tmp_path) == ["a.efi", "c.conf", "b.efi"]
    assert sources.entry("a", tmp_path).name == "entry a.efi (Debian GNU/Linux 13)"


@pytest.mark.parametrize("length", [0, 1, 0x3F, 0x40, 0x44, 0x57, 0x58, 0x70])
def test_a_uki_cut_off_is_an_entry_without_a_title(tmp_path: Path, length: int) -> None:
    uki(tmp_path, "a.efi", b"ID=debian\nPRETTY_NAME=Debian\n")
    whole = tmp_path / "boot/EFI/Linux/a.efi"
    whole.write_bytes(whole.read_bytes()[:length])
    (found,) = sources.entries(tmp_path)
    assert (found.id, found.fields) == ("a.efi", ())


def test_an_id_is_no_pattern_and_no_prefix(tmp_path: Path) -> None:
    add(tmp_path, "debian-6.12.conf")
    add(tmp_path, "fedora-6.12+2.conf")
    for wanted in ("debian", "deb*", "DEBIAN-6.12.conf", ""):
        with pytest.raises(UsageError):
            sources.entry(wanted, tmp_path)
    with pytest.raises(UsageError, match=r"Did you mean debian-6\.12\.conf\? There are: .*fedora-6\.12\.conf"):
        sources.entry("debian", tmp_path)
    assert sources.entry("fedora-6.12+2.conf", tmp_path) == sources.entry("fedora-6.12", tmp_path)


def test_a_name_of_two_entries_needs_its_suffix(tmp_path: Path) -> None:
    add(tmp_path, "a.conf")
    put(tmp_path, "boot/EFI/Linux/a.efi")
    with pytest.raises(UsageError, match="suffix"):
        sources.entry("a", tmp_path)
    assert sources.entry("a.efi", tmp_path).kernel.name == "a.efi"


def test_a_host_without_entries_is_told_where_they_would_be(tmp_path: Path) -> None:
    for wanted in ("a", None):
        with pytest.raises(Refused, match="--kernel") as raised:
            sources.entry(wanted, tmp_path)
        assert f"{tmp_path}/boot/" in raised.value.where


def three(root: Path) -> Path:
    for version in ("3", "2", "1"):
        add(root, f"k-{version}.conf", f"title Kernel {version}")
    return root


def test_systemd_boot_s_default(tmp_path: Path) -> None:
    """In the order of loader.conf(5) and systemd-boot(7), the weakest first."""
    three(tmp_path)
    assert default(tmp_path) == "k-3.conf"
    put(tmp_path, "boot/grub2/grubenv", "saved_entry=k-2\n")
    assert default(tmp_path) == "k-2.conf"
    conf = put(tmp_path, "boot/loader/loader.conf", "timeout 3\n")
    assert default(tmp_path) == "k-3.conf"  # GRUB does not boot where systemd-boot is set up
    conf.write_text("default K-[12]*\n")
    assert default(tmp_path) == "k-2.conf"
    conf.write_text("default @saved\n")
    assert default(tmp_path) == "k-3.conf"
    variable(tmp_path, "LoaderEntryLastBooted", "k-1.conf")
    assert default(tmp_path) == "k-1.conf"
    variable(tmp_path, "LoaderEntryDefault", "k-2")
    assert default(tmp_path) == "k-2.conf"
    variable(tmp_path, "LoaderEntryDefault", "@saved")
    assert default(tmp_path) == "k-1.conf"
    variable(tmp_path, "LoaderEntryPreferred", "k-3.conf")
    assert default(tmp_path) == "k-3.conf"


def test_what_is_preferred_must_not_be_bad_and_a_default_may(tmp_path: Path) -> None:
    three(tmp_path)
    add(tmp_path, "k-4+0-3.conf")
    variable(tmp_path, "LoaderEntryPreferred", "k-4.conf")
    assert default(tmp_path) == "k-3.conf"
    variable(tmp_path, "LoaderEntryDefault", "k-4.conf")
    assert default(tmp_path) == "k-4.conf"


def test_a_default_that_is_gone_is_none_and_windows_is_refused(tmp_path: Path) -> None:
    three(tmp_path)
    put(tmp_path, "boot/loader/loader.conf", "default auto-windows\n")
    variable(tmp_path, "LoaderEntryDefault", "removed.conf")
    with pytest.raises(Refused, match="auto-windows"):
        default(tmp_path)


def test_an_entry_for_another_machine_is_never_the_default(tmp_path: Path) -> None:
    three(tmp_path)
    add(tmp_path, "k-9.conf", "architecture ia64")
    assert default(tmp_path) == "k-3.conf"


@pytest.mark.parametrize("saved", ["k-1", "k-1.conf", "Kernel 1", "2"])
def test_grub_s_saved_entry(tmp_path: Path, saved: str) -> None:
    put(three(tmp_path), "boot/grub/grubenv", f"# GRUB Environment Block\nsaved_entry={saved}\n{'#' * 900}")
    assert default(tmp_path) == "k-1.conf"


def fedora(root: Path, env: str | None, entry: str = FEDORA) -> Path:
    """Fedora's layout without a partition for /boot: paths begin at the root."""
    put(root, "boot/loader/entries/id-6.12.conf", entry)
    for name in ("vmlinuz-6.12", "initramfs-6.12.img", "tuned.img"):
        put(root, f"boot/{name}")
    if env is not None:
        put(root, "boot/efi/EFI/fedora/grubenv", f"# GRUB Environment Block\n{env}")
    return root


def test_grub_s_variables(tmp_path: Path) -> None:
    env = "kernelopts=rhgb a=\\\\b\ntuned_params=nohz=on\ntuned_initrd=/boot/tuned.img\n####"
    found = sources.entry("id-6.12", fedora(tmp_path, env))
    assert found.kernel == tmp_path / "boot/vmlinuz-6.12"
    assert [path.name for path in found.initrds] == ["initramfs-6.12.img", "tuned.img"]
    assert found.cmdline == "root=UUID=1 ro rhgb a=\\b nohz=on quiet"


def test_of_grub_s_variables_tuned_s_may_be_unset(tmp_path: Path) -> None:
    found = sources.entry("id-6.12", fedora(tmp_path, "kernelopts=\n"))
    assert [path.name for path in found.initrds] == ["initramfs-6.12.img"]
    assert (found.cmdline or "").split() == ["root=UUID=1", "ro", "quiet"]


@pytest.mark.parametrize("env", [None, "saved_entry=id-6.12\n"])
def test_another_variable_that_is_unset_is_refused_by_its_name(tmp_path: Path, env: str | None) -> None:
    with pytest.raises(Refused, match=r"\$kernelopts") as raised:
        sources.entry("id-6.12", fedora(tmp_path, env))
    assert raised.value.where.endswith("id-6.12.conf:5")


def test_without_options_it_is_grub_s_default_for_them_or_nothing(tmp_path: Path) -> None:
    entry = "linux /boot/vmlinuz-6.12\n"
    assert sources.entry("id-6.12", fedora(tmp_path, None, entry)).cmdline == ""
    assert sources.entry("id-6.12", fedora(tmp_path, "default_kernelopts=root=1 ro\n", entry)).cmdline == "root=1 ro"


def test_a_uki_named_by_a_type_1_entry(tmp_path: Path) -> None:
    put(tmp_path, "boot/uki.efi")
    put(tmp_path, "boot/loader/entries/a.conf", "uki /uki.efi\n")
    put(tmp_path, "boot/loader/entries/b.conf", "uki /uki.efi\noptions quiet\nprofile 0\n")
    assert (sources.entry("a", tmp_path).kernel, sources.entry("a", tmp_path).cmdline) == (
        tmp_path / "boot/uki.efi",
        None,
    )
    assert sources.entry("b", tmp_path).cmdline == "quiet"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("linux /linux\ninitrd /gone\n", 2, "'/gone'"),
        ("linux /linux\ninitrd /link\n", 2, "leads out"),
        ("linux /up/../linux\n", 1, "leads out"),
        ("linux /directory\n", 1, "'/directory'"),
        ("linux /linux\nprofile 2\n", 2, "profile 2"),
        ("title x\nuki-url http://example.com/uki.efi\n", 2, "names no kernel"),
        ("linux /linux\narchitecture ia64\n", 2, "ia64"),
        ("linux /linux\noptions a=\udc80\n", 2, "UTF-8"),
    ],
)
def test_what_cannot_be_booted_is_refused_by_file_and_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    add(tmp_path, "other.conf")
    put(tmp_path, "boot/directory/x")
    put(tmp_path, "secret")
    (tmp_path / "boot/link").symlink_to("../secret")
    place = put(tmp_path, "boot/loader/entries/a.conf")
    place.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Refused) as raised:
        sources.entry("a", tmp_path)
    assert said in raised.value.what
    assert raised.value.where == f"{place}:{line}"


def test_what_kexec_leaves_behind_is_noted(tmp_path: Path) -> None:
    add(tmp_path, "a.conf", "devicetree /board.dtb\nextra /x.addon.efi\n")
    note = sources.entry("a", tmp_path).note
    assert "/board.dtb" in note
    assert "/x.addon.efi" in note


def test_kernel_install_s_layout(tmp_path: Path) -> None:
    put(tmp_path, "etc/machine-id", "6a9857a393724b7a981ebb5b8495b9ea\n")
    put(tmp_path, "etc/kernel/entry-token", "mine\n")
    for name in ("linux", "initrd-2", "initrd", "microcode", "notes"):
        put(tmp_path, f"efi/mine/6.12/{name}")
    found = sources.installed("6.12", tmp_path)
    assert found.kernel == tmp_path / "efi/mine/6.12/linux"
    assert [path.name for path in found.initrds] == ["microcode", "initrd", "initrd-2"]


def test_the_initrd_of_kernel_install_serves_a_packaged_kernel(tmp_path: Path) -> None:
    put(tmp_path, "etc/os-release", "NAME=x\nID='arch'\n")
    put(tmp_path, "usr/lib/modules/6.12/vmlinuz")
    put(tmp_path, "boot/arch/6.12/initrd")
    found = sources.installed("6.12", tmp_path)
    assert (found.kernel.name, found.initrds) == ("vmlinuz", (tmp_path / "boot/arch/6.12/initrd",))


@pytest.mark.parametrize(
    "kernel",
    [
        *(f"usr/lib/modules/6.12/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
        "lib/modules/6.12/vmlinuz",
        "boot/vmlinux-6.12",
        "boot/Image-6.12",
    ],
)
def test_every_place_of_a_packaged_kernel(tmp_path: Path, kernel: str) -> None:
    put(tmp_path, kernel)
    assert sources.installed("6.12", tmp_path).kernel == tmp_path / kernel
    with pytest.raises(UsageError, match=r"There are: 6\.12\."):
        sources.installed("6.13", tmp_path)


def test_a_version_that_only_an_entry_has(tmp_path: Path) -> None:
    add(tmp_path, "x.conf", "version 6.12\noptions quiet\n")
    put(tmp_path, "boot/EFI/Linux/token-6.13+3.efi")
    found = sources.installed("6.12", tmp_path)
    assert (found.kernel, found.cmdline) == (tmp_path / "boot/linux", "quiet")
    assert sources.installed("6.13", tmp_path).kernel == tmp_path / "boot/EFI/Linux/token-6.13+3.efi"
    for version in ("6.1", "12"):
        with pytest.raises(UsageError):
            sources.installed(version, tmp_path)


def test_white_space_that_is_none_to_the_kernel_stays_in_the_options(tmp_path: Path) -> None:
    add(tmp_path, "a.conf", "options\t root=LABEL=my\u3000disk \u00a0\noptions  \x0b \noptions \u2003quiet \r\n")
    assert sources.entry("a", tmp_path).cmdline == "root=LABEL=my\u3000disk \u00a0 \u2003quiet"


def test_an_initrd_s_name_may_have_white_space_that_is_none_to_ascii(tmp_path: Path) -> None:
    put(tmp_path, "boot/init\u3000rd")
    add(tmp_path, "a.conf", "initrd /init\u3000rd\n")
    assert [path.name for path in sources.entry("a", tmp_path).initrds] == ["init\u3000rd"]
