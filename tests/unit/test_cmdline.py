# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel's command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.errors import Exit, UsageError
from khod.kernel.cmdline import (
    compare_cmdlines,
    compose_cmdline,
    describe_losses,
    init_path,
    mounts_root,
    reusable_words,
    root_value,
    torn_words,
    turns_kho_off,
)
from khod.kernel.mark import is_marked
from khod.kernel.next_arg import Arg, is_switched_on, kernel_args, parse_word
from khod.kernel.words import kernel_words

RUNNING = "BOOT_IMAGE=/boot/vmlinuz-6.8 root=/dev/vda1 ro initrd=\\initrd.img kho=on khod.run=old quiet"


def test_the_running_line_travels_less_what_is_not_its_own() -> None:
    assert compose_cmdline(RUNNING, None, None, "r1", 2047) == "root=/dev/vda1 ro kho=on quiet khod.run=r1"


def test_a_given_line_replaces_it_and_words_are_appended() -> None:
    assert (
        compose_cmdline(RUNNING, "root=/dev/sdb", "single marker=1", "r1", 99)
        == "root=/dev/sdb single marker=1 khod.run=r1"
    )
    assert compose_cmdline(RUNNING, "", None, "r1", 99) == "khod.run=r1", "an empty line is a given one"
    assert compose_cmdline(RUNNING, None, "single", "r1", 99).endswith("quiet single khod.run=r1")


@pytest.mark.parametrize("where", ["given", "append"])
@pytest.mark.parametrize(("char", "name"), [("\0", "NUL"), ("\n", "newline")])
def test_a_nul_or_a_newline_is_named(where: str, char: str, name: str) -> None:
    words = {"given": "a", "append": "b", where: f"a{char}b"}
    with pytest.raises(UsageError, match=name) as raised:
        compose_cmdline(RUNNING, words["given"], words["append"], "r1", 99)
    assert raised.value.exit is Exit.usage


def test_the_limit_counts_bytes_and_the_mark() -> None:
    exact = len("xx khod.run=r1")
    assert compose_cmdline("", "xx", None, "r1", exact)
    with pytest.raises(UsageError, match=str(exact)):
        compose_cmdline("", "xxx", None, "r1", exact)
    with pytest.raises(UsageError):
        compose_cmdline("", "xü", None, "r1", exact)


@given(st.text(), st.none() | st.text(), st.none() | st.text())
def test_any_text_is_one_line_with_the_mark_or_a_usage_error(
    running: str, given_line: str | None, append: str | None
) -> None:
    line = ""
    try:
        line = compose_cmdline(running, given_line, append, "r1", 200)
    except UsageError as error:
        assert error.what  # noqa: PT017
        return
    assert is_marked(line, "r1")
    assert len(line.encode()) <= 200
    assert "\0" not in line
    assert "\n" not in line


def test_what_is_no_utf_8_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        compose_cmdline("", b"root=\xff".decode(errors="surrogateescape"), None, "r1", 99)


@pytest.mark.parametrize("line", ["khod.run=r12", "xkhod.run=r1", "khod.run=r1x", 'a="khod.run=r2"', ""])
def test_only_this_run_s_mark_counts(line: str) -> None:
    assert not is_marked(line, "r1")


def test_words_that_only_begin_alike_travel() -> None:
    words = ["BOOT_IMAGES=1", "initrdx=1", "rd.khod.run=3", "initrd"]
    assert reusable_words(" ".join(words)) == words


def test_what_is_appended_reaches_the_kernel_and_not_init() -> None:
    """Behind ` -- ` every word is init's (Documentation/admin-guide/kernel-parameters.rst)."""
    line = compose_cmdline("root=/dev/vda1 -- 3", None, "kho=on", "r1", 99)
    assert "kho=on" in line.partition(" -- ")[0].split()


def test_a_quoted_value_travels_whole() -> None:
    """next_arg() of lib/cmdline.c keeps the blanks between double quotes."""
    assert 'dyndbg="file a.c  +p; initrd=x +p"' in compose_cmdline(
        'dyndbg="file a.c  +p; initrd=x +p"', None, None, "r1", 99
    )


def test_words_are_removed_by_parameter_or_whole() -> None:
    running = "root=/dev/vda1 console=tty0 console=ttyS0 quiet log-buf-len=1M"
    gone = ["console=ttyS0", "quiet", "log_buf_len"]
    assert compose_cmdline(running, None, "quiet", "r1", 99, gone) == "root=/dev/vda1 console=tty0 quiet khod.run=r1"
    assert (
        compose_cmdline(running, None, None, "r1", 99, ["console"]) == "root=/dev/vda1 quiet log-buf-len=1M khod.run=r1"
    )
    line = compose_cmdline("console=y -- console=x", None, None, "r1", 99, ["console"])
    assert line.endswith("-- console=x"), "that is init's"


@pytest.mark.parametrize(
    ("name", "running", "said"),
    [
        ("quite", "root=/dev/vda1 quiet", "quite is not"),
        ("console=ttyS1", "console=ttyS0", "console=ttyS1 is not"),
        ("console", "ro -- console=x", "init's"),
        ("single", "ro", "single is not"),  # it is in --append alone
        ("rw\x1b", "rw", r"rw\\x1b"),
    ],
)
def test_a_word_to_remove_that_is_not_there_is_named(name: str, running: str, said: str) -> None:
    """Else a mistyped word would be booted with, and nobody told."""
    for line, given_line in ((running, None), ("", running)):
        with pytest.raises(UsageError, match=said) as raised:
            compose_cmdline(line, given_line, "single", "r1", 99, [name])
        assert raised.value.where == "`kernel.remove`"


def test_a_word_that_does_not_travel_may_be_removed_all_the_same() -> None:
    assert (
        compose_cmdline(RUNNING, None, None, "r1", 99, ["BOOT_IMAGE", "quiet"])
        == "root=/dev/vda1 ro kho=on khod.run=r1"
    )


def fates(running: str, new: str) -> dict[str, str]:
    return {word.text: word.fate.value for word in compare_cmdlines(running, new)}


def test_both_lines_side_by_side() -> None:
    assert fates(RUNNING, "root=/dev/vda1 kho=on single khod.run=new") == {
        "root=/dev/vda1": "kept",
        "kho=on": "kept",
        "single": "added",
        "ro": "removed",
        "quiet": "removed",
    }
    twice = [(word.text, word.fate.value) for word in compare_cmdlines("console=a console=a", "console=a")]
    assert twice == [("console=a", "kept"), ("console=a", "removed")]


KHO = "kho=on liveupdate=on reserve_mem=12M:4096:trace trace_instance=boot_map@trace root=/dev/vda"


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (KHO, []),
        ("root=/dev/sda " + KHO.replace("root=/dev/vda", ""), []),
        (KHO.replace("kho=on ", ""), ["kho=on"]),
        (KHO.replace("kho=on", "kho=off"), ["kho=on"]),
        (KHO.replace("liveupdate=on ", ""), ["liveupdate=on"]),
        (KHO.replace("12M", "24M"), ["trace", "changed"]),
        (KHO.replace("reserve_mem=12M:4096:trace ", ""), ["trace", "gone"]),
        (KHO.replace("boot_map@trace", "boot_map@other"), ["boot_map", "changed"]),
        (KHO.replace("trace_instance=boot_map@trace ", ""), ["boot_map", "gone"]),
    ],
)
def test_what_is_lost_with_a_word_is_named(new: str, named: list[str]) -> None:
    lost = list(describe_losses(compare_cmdlines(KHO, new)))
    assert len(lost) == bool(named)
    assert all(word in lost[0] for word in named)
    assert turns_kho_off(compare_cmdlines(KHO, new)) is (named == ["kho=on"])


@pytest.mark.parametrize("running", ["kho_scratch=512M", "kho_bootmem=512M"])
@pytest.mark.parametrize("new", ["quiet", "kho_scratch=1G", "kho_bootmem=512M"])
def test_nothing_is_lost_with_either_name_of_scratch(running: str, new: str) -> None:
    """A kernel that is reached by a handover gets its scratch from the one before (kho_memory_init())."""
    assert not list(describe_losses(compare_cmdlines(f"kho=on {running}", f"kho=on {new}")))


@pytest.mark.parametrize(
    ("line", "init_", "where"),
    [
        ("root=/dev/vda", "init", "/dev/vda"),
        ("rdinit=/bin/sh", "bin/sh", ""),
        ("a -- root=x rdinit=/y", "init", ""),
        ("root=/dev/vda root=UUID=1", "init", "UUID=1"),
    ],
)
def test_what_runs_first(line: str, init_: str, where: str) -> None:
    assert init_path(line) == init_
    assert root_value(line) == where


@pytest.mark.parametrize(
    ("line", "alone"),
    [
        *((f"root={name}", True) for name in ("/dev/vda1", "/dev/nvme0n1p2", "/dev/md0", "/dev/cciss/c0d0p1")),
        *(
            (f"root={name}", True)
            for name in ("/dev/nfs", "/dev/cifs", "/dev/ram", "/dev/mmcblk0p1", "/dev/ubiblock0_1")
        ),
        *((f"root={name}", True) for name in ("PARTUUID=0a1b-01", "PARTUUID=1/PARTNROFF=1", "PARTLABEL=root")),
        *((f"root={name}", True) for name in ("8:1", "8:1:0:", "0801", "B302", "mtd3", "mtd:rootfs", "ubi0:rootfs")),
        *((f"root={name}", False) for name in ("UUID=0123-4567", "LABEL=ROOT", "ZFS=rpool/ROOT/a", "zfs:AUTO")),
        *((f"root={name}", False) for name in ("gpt-auto", "fstab", "live:CDLABEL=a", "dhcp", "tmpfs", "overlay", "")),
        *((f"root=/dev/{name}", False) for name in ("mapper/vg-root", "disk/by-label/root", "vg/root", "md/root")),
        *((f"root=/dev/{name}", False) for name in ("root", "gpt-auto-root", "", "a" * 32)),
        ("root=8:1x", False),
        ("quiet", False),
        ("quiet -- root=/dev/vda1", False),
        ("root=/dev/dm-0", False),
        ('root=/dev/dm-0 dm-mod.create="vroot,,,ro,0 1 linear 254:1 0"', True),
        ("root=share", False),
        ("root=share rootfstype=virtiofs", True),
        ("root=share rootfstype=ext4,9p", True),
        ("root=UUID=1 rootfstype=ext4", False),
        ("root=/dev/vda1 root=LABEL=x", False),  # the last one counts
        ("root=LABEL=x root=/dev/vda1", True),
    ],
)
def test_which_root_the_kernel_mounts_without_an_initrd_s_programs(line: str, alone: bool) -> None:
    """parse_root_device() in init/do_mounts.c and early_lookup_bdev() in block/early-lookup.c."""
    assert mounts_root(line) is alone


# White space: what lib/ctype.c marks as `_S` separates the kernel's words, ASCII's alone the operator's.

NOT_SPACE = "\x1c\x1d\x1e\x1f\x85\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
"""White space to Python (the last two to people), none to the kernel."""


@pytest.mark.parametrize("char", NOT_SPACE, ids=ascii)
def test_a_line_keeps_white_space_that_is_none_to_the_kernel(char: str) -> None:
    given_line = f"root=LABEL=my{char}disk quiet"
    for line in (compose_cmdline("", given_line, None, "r1", 99), compose_cmdline("", "", given_line, "r1", 99)):
        assert line.startswith(given_line)
    assert compose_cmdline(f"BOOT_IMAGE=x {given_line}", None, None, "r1", 99) == f"{given_line} khod.run=r1"
    assert [word.text for word in compare_cmdlines("quiet", given_line)] == given_line.split(" ")
    assert compose_cmdline(given_line, None, None, "r1", 99, ["root"]) == "quiet khod.run=r1"
    assert torn_words(given_line) == []
    assert not is_marked(f"a{char}khod.run=r1", "r1")
    assert root_value(f"a{char}root=x") == ""
    assert init_path(f"a{char}rdinit=/x") == "init"
    assert not is_switched_on(f"a{char}kho=on", "kho")


@pytest.mark.parametrize("char", "\t\v\f\r ", ids=ascii)
def test_ascii_white_space_separates(char: str) -> None:
    assert compose_cmdline(f"a{char}{char}initrd=x{char}b", None, None, "r1", 99) == "a b khod.run=r1"
    assert is_marked(f"a{char}khod.run=r1{char}", "r1")
    assert is_switched_on(f"a{char}kho=on", "kho")


@pytest.mark.parametrize("char", ["\u00a0", "à", "†", "\u0420", "\U0001f4a0"], ids=ascii)
def test_the_byte_that_is_latin_1_s_no_break_space_ends_a_word_of_the_kernel_s(char: str) -> None:
    """Byte 160 is `_S|_SP` in lib/ctype.c, and the last one of each of these in UTF-8."""
    assert char.encode().endswith(b"\xa0")
    given_line = f"root=LABEL=voil{char}kho=on quiet"
    assert compose_cmdline("", given_line, None, "r1", 99) == f"{given_line} khod.run=r1", "bytes travel as they are"
    assert torn_words(given_line) == [f"root=LABEL=voil{char}kho=on"]
    assert torn_words(f'root="LABEL=voil{char}" quiet') == []
    assert is_switched_on(given_line, "kho"), "it reads one there"
    assert [arg.param for arg in kernel_args(given_line)] == ["root", "kho", "quiet"]


def test_a_running_line_that_is_no_utf_8_is_not_changed_in_silence() -> None:
    running = b"root=LABEL=\xff\xfe quiet".decode(errors="surrogateescape")
    with pytest.raises(UsageError, match="not UTF-8 at character 11") as raised:
        compose_cmdline(running, None, None, "r1", 99)
    assert raised.value.where == "/proc/cmdline"
    assert compose_cmdline(running, "root=/dev/vda", None, "r1", 99) == "root=/dev/vda khod.run=r1"
    assert kernel_words(running) == running.split(" ")


# Quotes: as next_arg() has them.


@pytest.mark.parametrize(
    ("word", "param", "value"),
    [
        ("quiet", "quiet", None),
        ("a=b=c", "a", "b=c"),
        ("a=", "a", ""),
        ("=a=b", "=a", "b"),
        ("=", "=", None),
        ('a="b c"', "a", "b c"),
        ('"a=b c"', "a", "b c"),
        ('"a b"', "a b", None),
        ('a=b"c d"', "a", 'b"c d"'),
        ('a="b"c', "a", 'b"c'),
        ('a="b', "a", "b"),
        ('a="', "a", ""),
        ('"', "", None),
        ('"--"', "--", None),
    ],
)
def test_a_word_is_taken_apart_as_the_kernel_does(word: str, param: str, value: str | None) -> None:
    assert parse_word(word) == Arg(param, value)


@pytest.mark.parametrize(("given_line", "append"), [('root=/dev/vda quiet"', "kho=on"), ("quiet", 'a="b'), ('"', None)])
def test_a_quote_without_its_end_is_refused(given_line: str, append: str | None) -> None:
    """next_arg() would take the marker, and all else that follows, into that word."""
    with pytest.raises(UsageError, match="double quote without its end") as raised:
        compose_cmdline("", given_line, append, "r1", 99)
    assert raised.value.where.startswith("`kernel.cmdline`")
    with pytest.raises(UsageError, match="double quote without its end") as raised:
        compose_cmdline(given_line if '"' in given_line else 'x"', None, None, "r1", 99)
    assert raised.value.where == "/proc/cmdline"


@pytest.mark.parametrize(
    ("given_line", "append", "where"),
    [('a="b', None, "u.efi"), ("a", 'b="', "`kernel.cmdline`"), ("\0", None, "u.efi")],
)
def test_what_is_wrong_with_an_image_s_own_line_is_not_said_of_an_option(
    given_line: str, append: str | None, where: str
) -> None:
    with pytest.raises(UsageError) as raised:
        compose_cmdline("", given_line, append, "r1", 99, where="u.efi: .cmdline")
    assert raised.value.where.startswith(where)


def test_a_quote_without_its_end_can_be_removed() -> None:
    assert compose_cmdline('ro quiet" b', None, None, "r1", 99, ['quiet" b']) == "ro khod.run=r1"


def test_quotes_around_a_word_hide_nothing() -> None:
    assert compose_cmdline('"initrd=a b" "BOOT-IMAGE=x" ro', None, None, "r1", 99) == "ro khod.run=r1"
    assert init_path('"rdinit=/bin/sh"') == "bin/sh"
    assert mounts_root('"root=/dev/vda"')
    assert is_switched_on('kho="on"', "kho")
    assert not list(describe_losses(compare_cmdlines("kho=on", '"kho=on"')))


def test_what_is_init_s_is_none_of_the_kernel_s() -> None:
    assert not is_switched_on("quiet -- kho=on", "kho")
    assert not is_switched_on('quiet "--" kho=on', "kho")
    assert not list(describe_losses(compare_cmdlines("quiet -- kho=on", "quiet")))
    assert list(describe_losses(compare_cmdlines("kho=on", "quiet -- kho=on")))


@pytest.mark.parametrize(
    ("line", "on"),
    [
        *((f"kho={value}", True) for value in ("on", "ON", "On", "oN", "1", "y", "Y", "yes", "t", "true", "enabled")),
        *((f"kho={value}", False) for value in ("off", "0", "n", "f", "disabled", "", "o", "x", "\u0131", "\u0130n")),
        ("kho", False),  # kstrtobool(NULL) is EINVAL
        ("kho=off kho=on", True),
        ("kho=on kho=off", False),
        ("kho=on kho=what", True),  # EINVAL changes nothing
        ("xkho=on", False),
        ("kho.x=on", False),
    ],
)
def test_a_boolean_is_read_as_kstrtobool_does(line: str, on: bool) -> None:
    assert is_switched_on(line, "kho") is on
