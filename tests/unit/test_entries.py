# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot loader entries in the specification's order, the loader's default among them, and GRUB's variables."""

import hashlib
import os
from pathlib import Path

import pytest

from khoctl.boot import sources
from khod.errors import Refused, UsageError
from tests.unit.images import portable

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
    return [one.id for one in sources.list_entries(root)]


def default(root: Path) -> str:
    return sources.source_of_entry(None, root).name.split()[1]


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
        (("k-1.conf", ""), ("k-1-2.conf", "")),  # to boot_entry_compare() the suffix is a part of the name
        (("a+3.conf", ""), ("a+2-1.conf", "")),  # the one with more tries left
        (("a+0-1.conf", ""), ("a+0-2.conf", "")),  # sorted by n
    ],
)
def test_the_order(tmp_path: Path, first: tuple[str, str], then: tuple[str, str]) -> None:
    for name, text in (then, first):
        add(tmp_path, name, text)
    assert [one.path.name for one in sources.list_entries(tmp_path)] == [first[0], then[0]]


def test_both_partitions_count_and_a_link_is_not_a_second_one(tmp_path: Path) -> None:
    add(tmp_path, "a.conf")
    add(tmp_path, "b.conf", partition="boot/efi")
    add(tmp_path, "a.conf", "title on the ESP", partition="boot/efi")
    (tmp_path / "efi").symlink_to("boot/efi")
    assert ids(tmp_path) == ["b.conf", "a.conf", "a.conf"]
    assert sources.source_of_entry("a", tmp_path).kernel == tmp_path / "boot/linux"


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
    (found,) = sources.list_entries(tmp_path)
    assert [field.value for field in found.fields if field.key == "title"] == ["A \x0c B", "", "Last"]
    assert found.field_text("title") == "Last"
    assert sources.source_of_entry("a", tmp_path).cmdline == "a  b"


def uki(root: Path, name: str, osrel: bytes) -> None:
    put(root, f"boot/EFI/Linux/{name}").write_bytes(portable([(".osrel", osrel)]))


def test_a_uki_sorts_by_its_os_release(tmp_path: Path) -> None:
    uki(tmp_path, "a+3.efi", b'ID=debian\nPRETTY_NAME="Debian GNU/Linux 13"\nVERSION_ID="13"\n')
    uki(tmp_path, "b.efi", b"ID=fedora\nVERSION_ID=41\n")
    add(tmp_path, "c.conf", "sort-key e")
    assert ids(tmp_path) == ["a.efi", "c.conf", "b.efi"]
    assert sources.source_of_entry("a", tmp_path).name == "entry a.efi (Debian GNU/Linux 13)"


@pytest.mark.parametrize("length", [0, 1, 0x3F, 0x40, 0x44, 0x57, 0x58, 0x16F])
def test_a_uki_cut_off_is_an_entry_without_a_title(tmp_path: Path, length: int) -> None:
    uki(tmp_path, "a.efi", b"ID=debian\nPRETTY_NAME=Debian\n")
    whole = tmp_path / "boot/EFI/Linux/a.efi"
    whole.write_bytes(whole.read_bytes()[:length])
    (found,) = sources.list_entries(tmp_path)
    assert (found.id, found.fields) == ("a.efi", ())


def test_an_id_is_no_pattern_and_no_prefix(tmp_path: Path) -> None:
    add(tmp_path, "debian-6.12.conf")
    add(tmp_path, "fedora-6.12+2.conf")
    for wanted in ("debian", "deb*", "DEBIAN-6.12.conf", ""):
        with pytest.raises(UsageError):
            sources.source_of_entry(wanted, tmp_path)
    with pytest.raises(UsageError, match=r"Did you mean debian-6\.12\.conf\? There are: .*fedora-6\.12\.conf"):
        sources.source_of_entry("debian", tmp_path)
    assert sources.source_of_entry("fedora-6.12+2.conf", tmp_path) == sources.source_of_entry("fedora-6.12", tmp_path)


def test_a_name_of_two_entries_needs_its_suffix(tmp_path: Path) -> None:
    add(tmp_path, "a.conf")
    put(tmp_path, "boot/EFI/Linux/a.efi")
    with pytest.raises(UsageError, match="suffix"):
        sources.source_of_entry("a", tmp_path)
    assert sources.source_of_entry("a.efi", tmp_path).kernel.name == "a.efi"


def test_a_host_without_entries_is_told_where_they_would_be(tmp_path: Path) -> None:
    for wanted in ("a", None):
        with pytest.raises(Refused, match="--kernel") as raised:
            sources.source_of_entry(wanted, tmp_path)
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
    assert default(tmp_path) == "k-1.conf"  # config_find_entry() holds it against ids, which have their suffix
    variable(tmp_path, "LoaderEntryDefault", "k-2.conf")
    assert default(tmp_path) == "k-2.conf"
    variable(tmp_path, "LoaderEntryDefault", "@saved")
    assert default(tmp_path) == "k-1.conf"
    variable(tmp_path, "LoaderEntryPreferred", "k-3.conf")
    assert default(tmp_path) == "k-3.conf"
    variable(tmp_path, "LoaderEntryOneShot", "K-2.conf")
    assert default(tmp_path) == "k-2.conf"
    assert sources.source_of_entry(None, tmp_path).note.startswith("k-2.conf was chosen only for the next boot")
    variable(tmp_path, "LoaderEntryOneShot", "kexec reboot")  # a kernel's own note (CONFIG_EFI_BOOTLOADER_CONTROL)
    assert (default(tmp_path), sources.source_of_entry(None, tmp_path).note) == ("k-3.conf", "")
    variable(tmp_path, "LoaderEntryOneShot", "auto-reboot-to-firmware-setup")
    variable(tmp_path, "LoaderEntryPreferred", "")
    with pytest.raises(Refused, match="auto-reboot-to-firmware-setup"):
        default(tmp_path)


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


def test_grub_s_entry_for_the_next_boot_comes_first(tmp_path: Path) -> None:
    """grub.cfg: if [ "${next_entry}" ]; then set default="${next_entry}"."""
    env = put(three(tmp_path), "boot/grub2/grubenv", "saved_entry=k-1\nnext_entry=k-2\n")
    assert default(tmp_path) == "k-2.conf"
    assert sources.source_of_entry(None, tmp_path).note.startswith("k-2.conf was chosen only for the next boot")
    env.write_text("saved_entry=k-1\nnext_entry=\n")
    assert (default(tmp_path), sources.source_of_entry(None, tmp_path).note) == ("k-1.conf", "")
    env.write_text("saved_entry=k-1\nnext_entry=gone\n")
    assert default(tmp_path) == "k-3.conf"  # GRUB falls back to its first entry
    put(tmp_path, "boot/loader/loader.conf")
    assert sources.source_of_entry(None, tmp_path).note == ""


MKCONFIG = """\
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default={default}
fi
if [ "${{boot_counter}}" = "0" ]; then
  set default=1
fi
"""


@pytest.mark.parametrize(
    ("written", "chosen"),
    [
        ('"${saved_entry}"', "k-1"),
        ("$saved_entry", "k-1"),
        ('"0"', "k-3"),
        ("1", "k-2"),
        ("'k-2'", "k-2"),
        ("'advanced>k-2'", "k-2"),
        ('"no"', "k-3"),
    ],
)
def test_a_saved_entry_counts_where_grub_cfg_asks_for_it(tmp_path: Path, written: str, chosen: str) -> None:
    """grub-mkconfig writes GRUB_DEFAULT down; with another value than `saved` an old saved_entry means nothing."""
    env = put(three(tmp_path), "boot/grub2/grubenv", "saved_entry=k-1\n")
    put(tmp_path, "boot/grub2/grub.cfg", MKCONFIG.format(default=written))
    put(tmp_path, "boot/efi/EFI/fedora/grub.cfg", "configfile $prefix/grub.cfg\n")
    assert default(tmp_path) == f"{chosen}.conf"
    env.write_text("saved_entry=k-1\nnext_entry=k-2\n")
    assert default(tmp_path) == "k-2.conf"


@pytest.mark.parametrize("written", ["'1>2'", "'advanced>gnulinux-6.1'"])
def test_what_lies_in_a_submenu_and_is_no_entry_is_refused(tmp_path: Path, written: str) -> None:
    three(tmp_path)
    put(tmp_path, "boot/grub2/grub.cfg", MKCONFIG.format(default=written))
    with pytest.raises(Refused, match="submenu"):
        default(tmp_path)


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
    found = sources.source_of_entry("id-6.12", fedora(tmp_path, env))
    assert found.kernel == tmp_path / "boot/vmlinuz-6.12"
    assert [path.name for path in found.initrds] == ["initramfs-6.12.img", "tuned.img"]
    assert found.cmdline == "root=UUID=1 ro rhgb a=\\b nohz=on quiet"


def test_of_grub_s_variables_tuned_s_may_be_unset(tmp_path: Path) -> None:
    found = sources.source_of_entry("id-6.12", fedora(tmp_path, "kernelopts=\n"))
    assert [path.name for path in found.initrds] == ["initramfs-6.12.img"]
    assert (found.cmdline or "").split() == ["root=UUID=1", "ro", "quiet"]


@pytest.mark.parametrize("env", [None, "saved_entry=id-6.12\n"])
def test_another_variable_that_is_unset_is_refused_by_its_name(tmp_path: Path, env: str | None) -> None:
    with pytest.raises(Refused, match=r"\$kernelopts") as raised:
        sources.source_of_entry("id-6.12", fedora(tmp_path, env))
    assert raised.value.where.endswith("id-6.12.conf:5")


def test_without_options_it_is_grub_s_default_for_them_or_nothing(tmp_path: Path) -> None:
    entry = "linux /boot/vmlinuz-6.12\n"
    assert sources.source_of_entry("id-6.12", fedora(tmp_path, None, entry)).cmdline == ""
    assert (
        sources.source_of_entry("id-6.12", fedora(tmp_path, "default_kernelopts=root=1 ro\n", entry)).cmdline
        == "root=1 ro"
    )


def test_a_uki_named_by_a_type_1_entry(tmp_path: Path) -> None:
    put(tmp_path, "boot/uki.efi")
    put(tmp_path, "boot/loader/entries/a.conf", "uki /uki.efi\n")
    put(tmp_path, "boot/loader/entries/b.conf", "uki /uki.efi\noptions quiet\nprofile 0\n")
    assert (sources.source_of_entry("a", tmp_path).kernel, sources.source_of_entry("a", tmp_path).cmdline) == (
        tmp_path / "boot/uki.efi",
        None,
    )
    assert sources.source_of_entry("b", tmp_path).cmdline == "quiet"


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
        sources.source_of_entry("a", tmp_path)
    assert said in raised.value.what
    assert raised.value.where == f"{place}:{line}"


def test_what_kexec_leaves_behind_is_noted(tmp_path: Path) -> None:
    add(tmp_path, "a.conf", "devicetree /board.dtb\nextra /x.addon.efi\n")
    note = sources.source_of_entry("a", tmp_path).note
    assert "/board.dtb" in note
    assert "/x.addon.efi" in note


def test_kernel_install_s_layout(tmp_path: Path) -> None:
    put(tmp_path, "etc/machine-id", "6a9857a393724b7a981ebb5b8495b9ea\n")
    put(tmp_path, "etc/kernel/entry-token", "mine\n")
    for name in ("linux", "initrd-2", "initrd", "microcode", "notes"):
        put(tmp_path, f"efi/mine/6.12/{name}")
    found = sources.source_of_version("6.12", tmp_path)
    assert found.kernel == tmp_path / "efi/mine/6.12/linux"
    assert [path.name for path in found.initrds] == ["microcode", "initrd", "initrd-2"]


def test_the_initrd_of_kernel_install_serves_a_packaged_kernel(tmp_path: Path) -> None:
    put(tmp_path, "etc/os-release", "NAME=x\nID='arch'\n")
    put(tmp_path, "usr/lib/modules/6.12/vmlinuz")
    put(tmp_path, "boot/arch/6.12/initrd")
    found = sources.source_of_version("6.12", tmp_path)
    assert (found.kernel.name, found.initrds) == ("vmlinuz", (tmp_path / "boot/arch/6.12/initrd",))


@pytest.mark.parametrize(
    "kernel",
    [
        *(f"usr/lib/modules/6.12/{name}" for name in ("vmlinuz", "vmlinux", "Image", "vmlinuz.efi", "Image.gz")),
        "lib/modules/6.12/vmlinuz",
        "boot/vmlinux-6.12",
        "boot/Image-6.12",
        "boot/kernel-6.12",
    ],
)
def test_every_place_of_a_packaged_kernel(tmp_path: Path, kernel: str) -> None:
    put(tmp_path, kernel)
    put(tmp_path, "boot/initrd.img-6.12")
    assert sources.source_of_version("6.12", tmp_path).kernel == tmp_path / kernel
    with pytest.raises(UsageError, match=r"There are: 6\.12\."):
        sources.source_of_version("6.13", tmp_path)


def test_a_version_that_only_an_entry_has(tmp_path: Path) -> None:
    add(tmp_path, "x.conf", "version 6.12\noptions quiet\n")
    put(tmp_path, "boot/EFI/Linux/token-6.13+3.efi")
    found = sources.source_of_version("6.12", tmp_path)
    assert (found.kernel, found.cmdline) == (tmp_path / "boot/linux", "quiet")
    assert sources.source_of_version("6.13", tmp_path).kernel == tmp_path / "boot/EFI/Linux/token-6.13+3.efi"
    for version in ("6.1", "12"):
        with pytest.raises(UsageError):
            sources.source_of_version(version, tmp_path)


def test_white_space_that_is_none_to_the_kernel_stays_in_the_options(tmp_path: Path) -> None:
    add(tmp_path, "a.conf", "options\t root=LABEL=my\u3000disk \u00a0\noptions  \x0b \noptions \u2003quiet \r\n")
    assert sources.source_of_entry("a", tmp_path).cmdline == "root=LABEL=my\u3000disk \u00a0 \u2003quiet"


def test_an_initrd_s_name_may_have_white_space_that_is_none_to_ascii(tmp_path: Path) -> None:
    put(tmp_path, "boot/init\u3000rd")
    add(tmp_path, "a.conf", "initrd /init\u3000rd\n")
    assert [path.name for path in sources.source_of_entry("a", tmp_path).initrds] == ["init\u3000rd"]


# Each boot loader in its own language


def one_entry(root: Path, text: str, loader: str) -> Path:
    """An entry, on a host of systemd-boot, of GRUB, or of nobody knows what."""
    marks = {"systemd-boot": "boot/loader/loader.conf", "GRUB": "boot/grub2/grubenv"}
    if loader in marks:
        put(root, marks[loader])
    put(root, "boot/linux")
    put(root, "boot/loader/entries/a.conf", f"linux /linux\n{text}\n")
    return root


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("memmap=128M$0x40000000 a=$kernelopts ${b}", "memmap=128M$0x40000000 a=$kernelopts ${b}"),
        (r"a=\$b \x20", r"a=\$b \x20"),
        ('"root=UUID=1 rw quiet"', "root=UUID=1 rw quiet"),
        ("'root=UUID=1 rw quiet'", "root=UUID=1 rw quiet"),
        ('dyndbg="file a.c +p"', 'dyndbg="file a.c +p"'),
        ("\"a'", "\"a'"),
        ('"', '"'),
        ('""', ""),
    ],
)
def test_systemd_boot_takes_options_as_they_stand_but_for_quotes_around_all(
    tmp_path: Path, options: str, line: str
) -> None:
    """boot.c has no variables; line_get_key_value() takes off a pair of quotes."""
    assert sources.source_of_entry("a", one_entry(tmp_path, f"options {options}", "systemd-boot")).cmdline == line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (r"memmap=128M\$0x40000000  quiet", "memmap=128M$0x40000000  quiet"),
        ("a='$b  c' d", '"a=$b  c" d'),
        (r'"root=UUID=1 $kernelopts \$x \n"', r'"root=UUID=1 rhgb ro $x \n"'),
        ("$kernelopts$kernelopts a", "rhgb rorhgb ro a"),
        (r"a=b\ c", '"a=b c"'),
        ("a=\"b\"'c'", "a=bc"),
        ("a=$ $", "a=$ $"),
        (r"dyndbg=\"+p\"", 'dyndbg="+p"'),
        ("a\\", "a\\"),
        ("root=LABEL=my\u3000disk", "root=LABEL=my\u3000disk"),
    ],
)
def test_grub_s_variables_quotes_and_backslashes_are_its_script_s(tmp_path: Path, options: str, line: str) -> None:
    """GRUB manual, "Quoting"; grub_create_loader_cmdline() puts quotes around an argument with a space in it."""
    root = one_entry(tmp_path, f"options {options}", "GRUB")
    put(root, "boot/grub2/grubenv", "kernelopts=rhgb ro\n")
    assert sources.source_of_entry("a", root).cmdline == line


@pytest.mark.parametrize("options", ['quiet"', "quiet 'a b", '"a\\"'])
def test_a_quote_without_its_end_is_refused_where_grub_would_read_on(tmp_path: Path, options: str) -> None:
    with pytest.raises(Refused, match="quote has no end") as raised:
        sources.source_of_entry("a", one_entry(tmp_path, f"options {options}", "GRUB"))
    assert raised.value.where.endswith("a.conf:2")


@pytest.mark.parametrize("character", "{}|&;<>")
def test_what_ends_a_command_of_grub_s_script_is_refused_unless_it_is_quoted(tmp_path: Path, character: str) -> None:
    """yylex.l: no part of a word. GRUB would hand on what stands before a `;`, and run an entry with another not."""
    with pytest.raises(Refused, match="part of GRUB's script") as raised:
        sources.source_of_entry("a", one_entry(tmp_path, f"options a=b{character}c d", "GRUB"))
    assert raised.value.where.endswith("a.conf:2")
    for quoted in (f"'b{character}c'", f'"b{character}c"', f"b\\{character}c"):
        found = sources.source_of_entry("a", one_entry(tmp_path, f"options a={quoted} d", "GRUB"))
        assert found.cmdline == f"a=b{character}c d"
    found = sources.source_of_entry("a", one_entry(tmp_path / "other", f"options a=b{character}c d", "systemd-boot"))
    assert found.cmdline == f"a=b{character}c d"


@pytest.mark.parametrize(
    ("options", "line"),
    [("a=b # kho=on", "a=b"), ("a=b #don't", "a=b"), ("a=b#c d", "a=b#c d"), (r"a \# b", "a # b"), ("'#' b", "# b")],
)
def test_a_comment_in_the_options_is_grub_s_alone(tmp_path: Path, options: str, line: str) -> None:
    assert sources.source_of_entry("a", one_entry(tmp_path, f"options {options}", "GRUB")).cmdline == line
    found = sources.source_of_entry("a", one_entry(tmp_path / "other", f"options {options}", "systemd-boot"))
    assert found.cmdline == options


@pytest.mark.parametrize("name", ["$?", "$#", "$*", "$@", "${?}", "$1"])
def test_the_script_s_own_variables_are_refused_by_their_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match=r"is a variable"):
        sources.source_of_entry("a", one_entry(tmp_path, f"options a={name}", "GRUB"))


def test_a_dollar_that_would_be_a_variable_to_grub_is_refused_with_its_escape(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"\$0x40000000") as raised:
        sources.source_of_entry("a", one_entry(tmp_path, "options memmap=128M$0x40000000", "GRUB"))
    assert r"\$" in raised.value.remedy


def test_of_a_loader_nobody_can_tell_a_variable_is_refused_and_the_rest_stands(tmp_path: Path) -> None:
    root = one_entry(tmp_path, 'options a\\b "c d"', "unknown")
    assert sources.source_of_entry("a", root).cmdline == 'a\\b "c d"'
    with pytest.raises(Refused, match=r"\$kernelopts"):
        sources.source_of_entry("a", one_entry(tmp_path, "options $kernelopts", "unknown"))


@pytest.mark.parametrize(
    ("said", "files", "line"),
    [
        ("systemd-boot 262", ("boot/grub2/grubenv",), "$x"),
        ("GRUB 2.14", ("boot/loader/loader.conf",), None),
        ("systemd-stub 262", ("boot/efi/EFI/systemd/systemd-bootx64.efi",), "$x"),
        ("", ("efi/EFI/fedora/grub.cfg",), None),
    ],
)
def test_which_loader_it_is(tmp_path: Path, said: str, files: tuple[str, ...], line: str | None) -> None:
    """The one that booted says so in LoaderInfo; else what is installed."""
    root = one_entry(tmp_path, r"options $x", "unknown")
    variable(root, "LoaderInfo", said)
    for name in files:
        put(root, name)
    if line is None:
        with pytest.raises(Refused):
            sources.source_of_entry("a", root)
    else:
        assert sources.source_of_entry("a", root).cmdline == line


@pytest.mark.parametrize("loader", ["systemd-boot", "GRUB"])
def test_quotes_around_a_path_are_no_part_of_it(tmp_path: Path, loader: str) -> None:
    for name in ("vmlinuz", "initrd.img"):
        put(tmp_path, f"boot/Debian 10 (Buster)/{name}")
    text = 'linux "/Debian 10 (Buster)/vmlinuz"\ninitrd "/Debian 10 (Buster)/initrd.img"\ntitle "Debian 10"'
    found = sources.source_of_entry("a", one_entry(tmp_path, text, loader))
    assert (found.kernel.name, [path.name for path in found.initrds]) == ("vmlinuz", ["initrd.img"])
    assert ("(Debian 10)" in found.name) is (loader == "systemd-boot")  # GRUB shows the title as it stands


def test_a_path_of_systemd_boot_s_is_the_whole_value_in_either_way_of_writing_it(tmp_path: Path) -> None:
    put(tmp_path, "boot/init rd")
    found = sources.source_of_entry("a", one_entry(tmp_path, "linux \\linux\ninitrd /init rd", "systemd-boot"))
    assert (found.kernel.name, [path.name for path in found.initrds]) == ("linux", ["init rd"])


def test_coreos_s_variable_is_empty_after_the_first_boot_and_refused_before(tmp_path: Path) -> None:
    """Ignition's snippet in grub.cfg: set ignition_firstboot="", and more only where the stamp is there."""
    root = one_entry(tmp_path, "options $ignition_firstboot root=UUID=1", "GRUB")
    assert (sources.source_of_entry("a", root).cmdline or "").split() == ["root=UUID=1"]
    put(root, "boot/ignition.firstboot", "")
    put(root, "boot/grub2/grubenv", "ignition_firstboot=x\n")
    with pytest.raises(Refused, match="provision it again"):
        sources.source_of_entry("a", root)


# Unified kernel images

PROFILES = [
    (".osrel", b"ID=x\nPRETTY_NAME=X\nIMAGE_VERSION=2\n"),
    (".linux", b"k"),
    (".cmdline", b"main"),
    (".profile", b"ID=main\nTITLE=Usual\n"),
    (".profile", b'ID=factory-reset\nTITLE="Factory reset"\n'),
    (".cmdline", b"systemd.factory_reset=1"),
    (".profile", b""),
]


def profiled(root: Path) -> Path:
    put(root, "boot/EFI/Linux/x+3-1.efi").write_bytes(portable(PROFILES))
    put(root, "boot/EFI/Linux/y.efi").write_bytes(portable([*PROFILES[:2], (".cmdline", b"y")]))
    return root


def test_each_profile_of_a_unified_image_is_an_entry(tmp_path: Path) -> None:
    """boot_entry_add_type2(): FILE.efi@ID or @NUMBER, behind the first in its order; the counter is no part of it."""
    found = sources.list_entries(profiled(tmp_path))
    assert [one.id for one in found] == ["y.efi", "x.efi", "x.efi@factory-reset", "x.efi@2"]
    assert [one.field_text("title") for one in found] == ["X", "X (Usual)", "X (Factory reset)", "X (Profile #3)"]


@pytest.mark.parametrize("profile", ["factory-reset", "2"])
def test_a_profile_is_refused_and_never_another_entry_taken(tmp_path: Path, profile: str) -> None:
    profiled(tmp_path)
    with pytest.raises(Refused, match=f"profile {profile}"):
        sources.source_of_entry(f"x.efi@{profile}", tmp_path)
    variable(tmp_path, "LoaderEntryDefault", f"x.efi@{profile.upper()}")
    with pytest.raises(Refused, match=f"profile {profile}"):
        default(tmp_path)
    for name in ("x", "x.efi", "x+3-1.efi"):
        assert sources.source_of_entry(name, tmp_path).kernel.name == "x+3-1.efi"
    with pytest.raises(UsageError, match=r"x\.efi@factory"):
        sources.source_of_entry("x.efi@factory", tmp_path)


def test_what_systemd_stub_would_add_to_a_unified_image_is_noted(tmp_path: Path) -> None:
    """UAPI.5, "PE Addons"; systemd-stub(7)."""
    sections = [(".osrel", b"ID=x\n"), (".linux", b"k"), (".cmdline", b"a")]
    image = put(tmp_path, "boot/EFI/Linux/x+3.efi")
    image.write_bytes(portable(sections))
    put(tmp_path, "boot/loader/addons/README")
    put(tmp_path, "efi/loader/addons/of-another-file-system.addon.efi")
    assert sources.source_of_entry("x", tmp_path).note == sources.image_note(str(image), tmp_path) == ""
    image.write_bytes(portable([*sections, (".pcrsig", b"{}"), (".dtb", b"tree")]))
    luks = portable([(".cmdline", b"rd.luks.options=discard\n\0")])
    put(tmp_path, "boot/EFI/Linux/x.efi.extra.d/luks.addon.efi").write_bytes(luks)
    put(tmp_path, "boot/EFI/Linux/x+3.efi.extra.d/db.cred")
    put(tmp_path, "boot/EFI/Linux/x.efi.extra.d/more.sysext.raw")
    put(tmp_path, "boot/EFI/Linux/x.efi.extra.d/old.raw")
    put(tmp_path, "boot/loader/addons/all.addon.efi")
    put(tmp_path, "boot/loader/credentials/host.cred")
    note = sources.source_of_entry("x", tmp_path).note
    for name in (
        "luks.addon.efi",
        "rd.luks.options=discard",
        "db.cred",
        "more.sysext.raw",
        "old.raw",
        "all.addon.efi",
        "host.cred",
    ):
        assert name in note
    assert "signed PCR policy" in note
    assert "device tree" in note
    assert "another-file-system" not in note
    put(tmp_path, "boot/loader/entries/a.conf", "uki /EFI/Linux/x+3.efi\ndevicetree /board.dtb\n")
    for noted in (sources.source_of_entry("a", tmp_path).note, sources.image_note(str(image), tmp_path)):
        assert {"db.cred", "all.addon.efi"} <= set(noted.replace("(", " ").replace(")", " ").replace(",", " ").split())


@pytest.mark.parametrize("key", ["linux", "uki"])
def test_an_entry_s_options_count_as_systemd_stub_takes_them(tmp_path: Path, key: str) -> None:
    """use_load_options(): none are given, or Secure Boot and a command line in the image: then that counts."""

    def cmdline(sections: list[tuple[str, bytes]], options: str) -> str | None:
        put(tmp_path, "boot/x.efi").write_bytes(portable([(".linux", b"k"), *sections]))
        put(tmp_path, "boot/loader/entries/a.conf", f"{key} /x.efi\n{options}")
        return sources.source_of_entry("a", tmp_path).cmdline

    own = [(".cmdline", b"root=/dev/vda1")]
    for options in ("", "options\n"):
        assert (cmdline(own, options), cmdline([], options)) == (None, "")
    assert cmdline(own, "options quiet\n") == cmdline([], "options quiet\n") == "quiet"
    put(tmp_path, f"{EFIVARS}/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(b"\6\0\0\0\1")
    assert cmdline([], "options quiet\n") == "quiet"
    assert cmdline(own, "options quiet\n") is None
    assert "options of a.conf are left out" in sources.source_of_entry("a", tmp_path).note


def test_a_thin_image_is_the_files_it_names_where_they_are_what_it_was_made_for(tmp_path: Path) -> None:
    """lanzaboote's stub, thin.rs: paths in .linux and .initrd, SHA-256 of the files in .linuxh and .initrdh."""
    paths = {".linux": rb"\EFI\nixos\kernel-6.12.efi", ".initrd": rb"\EFI\nixos\initrd-6.12.efi"}
    files = {".linux": b"kernel", ".initrd": b"initrd"}
    hashes = {f"{name}h": hashlib.sha256(contents).digest() for name, contents in files.items()}
    sections = [(".osrel", b"ID=nixos\n"), (".cmdline", b"init=/nix/store/a/init\n"), *paths.items(), *hashes.items()]
    put(tmp_path, "boot/EFI/Linux/nixos-294.efi").write_bytes(portable(sections))
    for name, contents in files.items():
        put(tmp_path, "boot" + paths[name].decode().replace("\\", "/")).write_bytes(contents)
    found = sources.source_of_entry("nixos-294", tmp_path)
    assert (found.kernel.read_bytes(), [path.read_bytes() for path in found.initrds]) == (b"kernel", [b"initrd"])
    assert found.cmdline == "init=/nix/store/a/init"
    put(tmp_path, "boot/EFI/nixos/initrd-6.12.efi", "another")
    with pytest.raises(Refused, match="another file than it was made for"):
        sources.source_of_entry("nixos-294", tmp_path)
    (tmp_path / "boot/EFI/nixos/initrd-6.12.efi").unlink()
    with pytest.raises(Refused, match="not a file there"):
        sources.source_of_entry("nixos-294", tmp_path)
    put(tmp_path, "secret").write_bytes(files[".linux"])
    for path in (rb"\..\secret", b"\0x", b"x" * 5000):
        sections = [(".linux", path), *hashes.items()]
        put(tmp_path, "boot/EFI/Linux/nixos-294.efi").write_bytes(portable(sections))
        with pytest.raises(Refused, match=r"nixos-294\.efi names"):
            sources.source_of_entry("nixos-294", tmp_path)


def test_a_pipe_for_an_image_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert sources.image_note(str(tmp_path / "pipe"), tmp_path) == ""
    assert sources.image_note(str(tmp_path / "gone"), tmp_path) == ""
