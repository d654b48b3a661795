# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last words of a kernel, from a directory that looks like pstore's."""

import os
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.kernel.pstore import MAX_CHARACTERS, MAX_LINES, read_last_words

SYS, KEPT = "sys/fs/pstore", "var/lib/systemd/pstore"
BEGUN = 1_000_000.0
TRACE = (
    "<6>[1.0] before\n<0>[1.2] Kernel panic - not syncing: no init\n<4>[1.3] CPU: 0 Comm: init Not tainted 7.3.4 #1\n"
)


def lay(root: Path, name: str, text: str | bytes, at: float = BEGUN + 60) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    os.utime(path, (at, at))


@pytest.mark.parametrize("place", [SYS, KEPT, f"{KEPT}/1795661761/001"])
def test_a_panic_is_found_wherever_its_file_lies_now(tmp_path: Path, place: str) -> None:
    lay(tmp_path, f"{place}/dmesg-ramoops-0", TRACE)
    lay(tmp_path, f"{place}/console-ramoops-0", "[9.9] the console\n", BEGUN + 90)
    found = read_last_words(HostCalls(tmp_path), BEGUN)
    assert [line.partition("] ")[2] for line in found] == [
        "Kernel panic - not syncing: no init",
        "CPU: 0 Comm: init Not tainted 7.3.4 #1",
    ]


def test_what_was_written_before_the_handover_is_of_another_kernel(tmp_path: Path) -> None:
    lay(tmp_path, f"{SYS}/dmesg-ramoops-0", TRACE, BEGUN - 1)
    assert read_last_words(HostCalls(tmp_path), BEGUN) == []
    lay(tmp_path, f"{SYS}/console-ramoops-0", "one\ntwo\n")
    assert read_last_words(HostCalls(tmp_path), BEGUN) == ["one", "two"]


def test_of_several_dumps_the_newest_counts(tmp_path: Path) -> None:
    lay(tmp_path, f"{SYS}/dmesg-ramoops-0", "old\n", BEGUN + 1)
    lay(tmp_path, f"{SYS}/dmesg-ramoops-1", "new\n", BEGUN + 2)
    assert read_last_words(HostCalls(tmp_path), BEGUN) == ["new"]


def test_the_words_are_bounded_and_printable(tmp_path: Path) -> None:
    lines = [f"{number} \x1b[2J{'x' * 1000}" for number in range(1000)]
    lay(tmp_path, f"{SYS}/console-ramoops-0", "\n".join(lines).encode() + b"\n\xff\0\n")
    found = read_last_words(HostCalls(tmp_path), BEGUN)
    assert len(found) == MAX_LINES
    assert all(line.isprintable() and len(line) <= MAX_CHARACTERS for line in found)


@pytest.mark.parametrize("name", ["dmesg-efi-0.enc.z", "README", "other-0"])
def test_other_files_are_left_alone(tmp_path: Path, name: str) -> None:
    lay(tmp_path, f"{SYS}/{name}", "text\n")
    assert read_last_words(HostCalls(tmp_path), BEGUN) == []


def test_a_host_without_pstore_has_no_last_words(tmp_path: Path) -> None:
    assert read_last_words(HostCalls(tmp_path), BEGUN) == []
