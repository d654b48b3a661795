"""The next kernel's command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.cmdline import compare, compose, has_root, init, losses, marked, off, reusable
from khod.errors import Exit, UsageError

RUNNING = "BOOT_IMAGE=/boot/vmlinuz-6.8 root=/dev/vda1 ro initrd=\\initrd.img kho=on khod.run=old quiet"


def test_the_running_line_travels_less_what_is_not_its_own() -> None:
    assert compose(RUNNING, None, None, "r1", 2047) == "root=/dev/vda1 ro kho=on quiet khod.run=r1"


def test_a_given_line_replaces_it_and_words_are_appended() -> None:
    assert compose(RUNNING, "root=/dev/sdb", "single marker=1", "r1", 99) == "root=/dev/sdb single marker=1 khod.run=r1"
    assert compose(RUNNING, "", None, "r1", 99) == "khod.run=r1", "an empty line is a given one"
    assert compose(RUNNING, None, "single", "r1", 99).endswith("quiet single khod.run=r1")


@pytest.mark.parametrize("where", ["given", "append"])
@pytest.mark.parametrize(("char", "name"), [("\0", "NUL"), ("\n", "newline")])
def test_a_nul_or_a_newline_is_named(where: str, char: str, name: str) -> None:
    words = {"given": "a", "append": "b", where: f"a{char}b"}
    with pytest.raises(UsageError, match=name) as raised:
        compose(RUNNING, words["given"], words["append"], "r1", 99)
    assert raised.value.exit is Exit.usage


def test_the_limit_counts_bytes_and_the_mark() -> None:
    exact = len("xx khod.run=r1")
    assert compose("", "xx", None, "r1", exact)
    with pytest.raises(UsageError, match=str(exact)):
        compose("", "xxx", None, "r1", exact)
    with pytest.raises(UsageError):
        compose("", "xü", None, "r1", exact)


@given(st.text(), st.none() | st.text(), st.none() | st.text())
def test_any_text_is_one_line_with_the_mark_or_a_usage_error(
    running: str, given_line: str | None, append: str | None
) -> None:
    line = ""
    try:
        line = compose(running, given_line, append, "r1", 200)
    except UsageError as error:
        assert error.what  # noqa: PT017
        return
    assert marked(line, "r1")
    assert len(line.encode()) <= 200
    assert "\0" not in line
    assert "\n" not in line


def test_what_is_no_utf_8_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        compose("", b"root=\xff".decode(errors="surrogateescape"), None, "r1", 99)


@pytest.mark.parametrize("line", ["khod.run=r12", "xkhod.run=r1", "khod.run=r1x", 'a="khod.run=r2"', ""])
def test_only_this_run_s_mark_counts(line: str) -> None:
    assert not marked(line, "r1")


def test_words_that_only_begin_alike_travel() -> None:
    words = ["BOOT_IMAGES=1", "initrdx=1", "rd.khod.run=3", "initrd"]
    assert reusable(" ".join(words)) == words


def test_what_is_appended_reaches_the_kernel_and_not_init() -> None:
    """Behind ` -- ` every word is init's (Documentation/admin-guide/kernel-parameters.rst)."""
    line = compose("root=/dev/vda1 -- 3", None, "kho=on", "r1", 99)
    assert "kho=on" in line.partition(" -- ")[0].split()


def test_a_quoted_value_travels_whole() -> None:
    """next_arg() of lib/cmdline.c keeps the blanks between double quotes."""
    assert 'dyndbg="file a.c  +p; initrd=x +p"' in compose('dyndbg="file a.c  +p; initrd=x +p"', None, None, "r1", 99)


def test_words_are_removed_by_parameter_or_whole() -> None:
    running = "root=/dev/vda1 console=tty0 console=ttyS0 quiet log-buf-len=1M"
    gone = ["console=ttyS0", "quiet", "log_buf_len"]
    assert compose(running, None, "quiet", "r1", 99, gone) == "root=/dev/vda1 console=tty0 quiet khod.run=r1"
    assert compose(running, None, None, "r1", 99, ["console"]) == "root=/dev/vda1 quiet log-buf-len=1M khod.run=r1"
    assert compose("a -- console=x", None, None, "r1", 99, ["console"]).endswith("-- console=x"), "that is init's"


def fates(running: str, new: str) -> dict[str, str]:
    return {word.text: word.fate.value for word in compare(running, new)}


def test_both_lines_side_by_side() -> None:
    assert fates(RUNNING, "root=/dev/vda1 kho=on single khod.run=new") == {
        "root=/dev/vda1": "kept",
        "kho=on": "kept",
        "single": "added",
        "ro": "removed",
        "quiet": "removed",
    }
    twice = [(word.text, word.fate.value) for word in compare("console=a console=a", "console=a")]
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
    lost = list(losses(compare(KHO, new)))
    assert len(lost) == bool(named)
    assert all(word in lost[0] for word in named)
    assert off(compare(KHO, new)) is (named == ["kho=on"])


@pytest.mark.parametrize(
    ("line", "init_", "root"),
    [("root=/dev/vda", "init", True), ("rdinit=/bin/sh", "bin/sh", False), ("a -- root=x rdinit=/y", "init", False)],
)
def test_what_runs_first(line: str, init_: str, root: bool) -> None:
    assert init(line) == init_
    assert has_root(line) is root
