# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl dt as a process and within: khod's trees and those in files, and what it ends in."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.simulated.kernel import build_initrd
from tests.dtc import dtc
from tests.unit.images import bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, Terminal, cli
from tests.unit.trees import PAGE, U32, compatible, fdt, ftrace, kho_v4, mem, memblock

DIFFERENT = 1  # as diff(1) ends


@pytest.fixture(scope="module")
def khod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Khod]:
    """A khod in its second kernel, and active again."""
    directory = tmp_path_factory.mktemp("khod")
    (directory / "vmlinuz").write_bytes(bzimage())
    (directory / "initrd").write_bytes(build_initrd())
    made = Khod(directory)
    jumped = made.khoctl("kexec", "--now", "--image", directory / "vmlinuz", "--initrd", directory / "initrd")
    assert jumped.code == Exit.done, jumped.err
    made.word("READY=1")
    assert made.khoctl("activate").code == Exit.done
    yield made
    made.close()


@pytest.fixture
def nobody(tmp_path: Path) -> Path:
    """A socket that is not there: trees in files need no khod."""
    return tmp_path / "socket"


def refused(ended: Answer, code: int, *words: str) -> None:
    assert ended.code == code, ended
    assert ended.err.startswith("khoctl: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


def test_what_left_is_listed_and_shown_by_its_id(khod: Khod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    mine, kept = khod.khoctl("dt", "list", "--json").json
    boot = khod.kernel.read_file("/proc/sys/kernel/random/boot_id").decode().strip()
    assert (mine["boot_id"] == boot) > (kept["boot_id"] == boot), "the newest first, and it has not left yet"
    assert kept["generation"] == "sysfs"
    page = khod.khoctl("dt", "list").out
    for word in (kept["id"], str(kept["bytes"]), kept["release"]):
        assert word in page
    assert (mine["outcome"], kept["outcome"]) == ("active", "verified")
    header, first, second = page.splitlines()
    assert all(len(line) <= 80 for line in (header, first, second)), page
    by_id = khod.khoctl("dt", "show", kept["id"])
    assert by_id.code == Exit.done
    assert by_id.out == khod.khoctl("dt", "show", "snapshot").out


def test_a_snapshot_of_what_never_left_is_said_to_be(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    try:
        for command in ("activate", "abort"):
            assert khod.khoctl(command).code == Exit.done
        (snapshot,) = khod.khoctl("dt", "list", "--json").json
        assert snapshot["outcome"] == "rolled_back"
        assert "rolled back" in khod.khoctl("dt", "list").out
    finally:
        khod.close()


def test_what_left_is_what_arrived(khod: Khod) -> None:
    assert khod.khoctl("dt", "diff") == Answer(Exit.done, "", "")
    changed = khod.khoctl("dt", "diff", "in", "out")
    assert changed.code in (Exit.done, DIFFERENT)
    assert khod.khoctl("dt", "diff", "--json").json == []


@pytest.mark.parametrize("tree", ["out", "in", "snapshot"])
def test_each_tree_is_shown_and_fits(khod: Khod, tree: str) -> None:
    shown = khod.khoctl("dt", "show", tree)
    assert 'compatible = "ftrace,cpu-v1"' in shown.out
    assert "scratch: " in shown.out, "khod knows this host's"
    assert khod.khoctl("dt", "show", "--side", tree).out == shown.out
    assert khod.khoctl("dt", "validate", tree).code == Exit.done


def test_a_tree_is_exported_in_each_form(khod: Khod, tmp_path: Path) -> None:
    for form in ("dtb", "dts", "json"):
        ended = khod.khoctl("dt", "export", "out", "--format", form, "--output", tmp_path / form)
        assert ended.code == Exit.done, ended.err
    blob = (tmp_path / "dtb").read_bytes()
    assert blob == khod.kernel.read_file("/sys/kernel/kho/dt")
    assert dtc("dts", (tmp_path / "dts").read_bytes()) == dtc("dtb", blob)
    assert json.loads((tmp_path / "json").read_text())["root"]["compatible"] == "kho-v1"


def test_a_name_that_is_no_tree(khod: Khod) -> None:
    refused(khod.khoctl("dt", "show", "nowhere"), Exit.usage, "'nowhere'", "khoctl dt list")
    refused(khod.khoctl("dt", "show", "out", "--blob", "x"), Exit.usage, "'x'", "root")


# Files


def tree(place: Path) -> Path:
    """A snapshot as khod keeps it."""
    (place / "blobs").mkdir(parents=True)
    (place / "root").write_bytes(kho_v4(memblock=(PAGE, 141)))
    (place / "blobs/memblock").write_bytes(memblock(trace=(0x100000, 0x200000)))
    return place


def test_files_need_no_khod(nobody: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(ftrace([mem((0, PAGE), (PAGE, PAGE))]))
    assert "2 ranges, 8 KiB" in cli(nobody, "dt", "show", tmp_path / "blob").out
    assert cli(nobody, "dt", "validate", tmp_path / "blob").code == Exit.done
    assert cli(nobody, "dt", "diff", tmp_path / "blob", tmp_path / "blob").code == Exit.done
    refused(cli(nobody, "dt", "show", "out"), Exit.unreachable, "systemctl start kho-handover")


def test_a_directory_is_a_tree_with_its_blobs(nobody: Path, tmp_path: Path) -> None:
    snapshot = tree(tmp_path / "snapshot")
    copied = tmp_path / "copied"  # as debugfs has it
    (copied / "sub_fdts").mkdir(parents=True)
    (copied / "fdt").write_bytes((snapshot / "root").read_bytes())
    (copied / "sub_fdts/memblock").write_bytes(memblock(trace=(0x100000, 0x100000)))
    shown = cli(nobody, "dt", "show", snapshot)
    assert "size = 0x200000 (2 MiB)" in shown.out
    one = cli(nobody, "dt", "show", snapshot, "--blob", "memblock", "--json").json
    assert list(one) == ["memblock"]
    changed = cli(nobody, "dt", "diff", snapshot, copied)
    assert changed.code == DIFFERENT
    assert changed.out.splitlines()[2:] == [
        "-memblock:/trace size = 0x200000 (2 MiB)",
        "+memblock:/trace size = 0x100000 (1 MiB)",
    ]
    found = cli(nobody, "dt", "diff", snapshot, copied, "--json").json
    assert found[0]["prop"] == "size"
    exported = cli(nobody, "dt", "export", snapshot, "-o", tmp_path / "made", "--blob", "memblock")
    assert exported.code == Exit.done, exported.err
    assert (tmp_path / "made").read_bytes() == (snapshot / "blobs/memblock").read_bytes()


def test_the_summary_is_the_same_in_json(nobody: Path, tmp_path: Path) -> None:
    snapshot = tree(tmp_path / "snapshot")
    found = cli(nobody, "dt", "show", snapshot, "--summary", "--json", "--scratch", "0x200000+1M").json
    assert [blob["compatible"] for blob in found["blobs"]] == ["kho-v4", "memblock-v1"]
    assert (found["memory"]["ranges"], found["memory"]["in_scratch"]) == (2, 0x100000)
    page = cli(nobody, "dt", "show", snapshot, "--summary", "--scratch", "0x200000+1M").out
    assert "1 MiB of it lie in scratch" in page


def test_what_does_not_fit_a_schema_is_exit_code_3(nobody: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(fdt(compatible("memblock-v1") | {"odd": U32(1)}))
    ended = cli(nobody, "dt", "validate", tmp_path / "blob")
    assert ended.code == Exit.refused
    assert "unexpected property: odd" in ended.out
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas/memblock-v1.json").write_text("{}")
    assert cli(nobody, "dt", "validate", tmp_path / "blob", "--schemas", tmp_path / "schemas").code == Exit.done
    refused(cli(nobody, "dt", "validate", tmp_path / "blob", "--schemas", tmp_path / "none"), Exit.usage, "none")
    (tmp_path / "schemas/memblock-v1.json").write_text("{")
    refused(
        cli(nobody, "dt", "validate", tmp_path / "blob", "--schemas", tmp_path / "schemas"), Exit.usage, "v1.json:1"
    )


NO_TREES = ["nowhere/", "empty", "directory", "loop", "text"]


@pytest.mark.parametrize("name", NO_TREES)
@pytest.mark.parametrize("command", [("show",), ("validate",), ("export",), ("diff",)])
def test_what_is_no_tree_is_a_sentence(nobody: Path, tmp_path: Path, name: str, command: tuple[str, ...]) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text").write_bytes(b"root=/dev/sda1\n" * 9)
    verb, *words = command
    paths = [tmp_path / name] * (2 if verb == "diff" else 1)
    ended = cli(nobody, "dt", verb, *paths, *words)
    if name == "text" and verb != "validate":
        assert ended.code == (Exit.failed if verb == "show" else Exit.done), "bytes are given back, whatever they are"
        assert ended.out or verb == "diff"
    elif name == "text":
        assert ended.code == Exit.refused
        assert ended.out.startswith("root:/")
    else:
        refused(ended, Exit.usage, str(tmp_path / name.rstrip("/")))


def test_an_export_never_takes_its_only_word_for_the_output(nobody: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(kho_v4(memblock=(PAGE, 141)))
    before = blob.read_bytes()
    assert run("dt", "export", blob).stdout == before
    refused(cli(nobody, "dt", "export", "out", blob), Exit.usage, "dt export -h")
    assert blob.read_bytes() == before


def test_a_blob_s_bytes_are_kept_from_a_terminal(khod: Khod) -> None:
    terminal = Terminal(khod, "dt", "export", "out")
    assert terminal.end() == Exit.usage
    assert "-o FILE" in terminal.said


@pytest.mark.parametrize("form", [(), ("--summary",), ("--json",), ("--summary", "--json")])
@pytest.mark.parametrize(
    ("made", "code"),
    [
        ({"root": kho_v4(memblock=(PAGE, 141))}, Exit.done),
        ({"root": kho_v4(memblock=(PAGE, 141)), "blobs/other": b"anything"}, Exit.done),
        ({"root": kho_v4(memblock=(PAGE, 141)), "blobs/memblock": memblock(trace=(PAGE, PAGE))[:-9]}, Exit.failed),
        ({"root": b"foreign", "blobs/memblock": memblock(trace=(PAGE, PAGE))}, Exit.failed),
        ({"fdt": kho_v4(memblock=(PAGE, 141))[:-20]}, Exit.done),
    ],
    ids=["whole", "another's blob", "a blob cut", "a foreign root", "a root as debugfs may show it"],
)
def test_a_damaged_tree_is_shown_and_ends_with_1(
    nobody: Path, tmp_path: Path, made: dict[str, bytes], code: int, form: tuple[str, ...]
) -> None:
    (tmp_path / "tree/blobs").mkdir(parents=True)
    for name, data in made.items():
        (tmp_path / "tree" / name).write_bytes(data)
    ended = cli(nobody, "dt", "show", tmp_path / "tree", *form)
    assert (ended.code, ended.err) == (code, "")
    assert ended.out.count("memblock") >= ("blobs/memblock" in made)


def test_a_file_that_was_cut_ends_with_1(nobody: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(kho_v4(memblock=(PAGE, 141))[:-20])
    ended = cli(nobody, "dt", "show", tmp_path / "blob")
    assert ended.code == Exit.failed
    assert "(!)" in ended.out


def test_a_valid_tree_is_said_to_be(nobody: Path, tmp_path: Path) -> None:
    made = tree(tmp_path / "snapshot")
    assert cli(nobody, "dt", "validate", made) == Answer(Exit.done, "valid: root, memblock\n", "")
    assert cli(nobody, "dt", "validate", made, "--json").json == {"valid": True, "findings": []}
    (made / "blobs/memblock").write_bytes(fdt(compatible("memblock-v1") | {"odd": U32(1)}))
    ended = cli(nobody, "dt", "validate", made, "--json")
    assert (ended.code, ended.json["valid"]) == (Exit.refused, False)
    (finding,) = ended.json["findings"]
    assert finding == {"path": "memblock:/", "prop": "", "what": "unexpected property: odd", "fits": False}


def test_one_byte_is_one_byte_and_a_name_s_bytes_are_bytes(nobody: Path, tmp_path: Path) -> None:
    blob = fdt(compatible("mine-v1") | {"odd": b"\0", "name-?": b""})
    (tmp_path / "blob").write_bytes(blob.replace(b"name-?", b"name-\xff"))
    shown = cli(nobody, "dt", "show", tmp_path / "blob").out
    assert "odd = 00 [1 byte]" in shown
    assert "name-\\xff" in shown


def test_a_tree_on_standard_input_and_an_endless_one() -> None:
    blob = ftrace([mem((0, PAGE))])
    assert b"1 range, 4 KiB" in run("dt", "show", "-", given=blob).stdout
    endless = run("dt", "show", "/dev/zero")
    assert endless.returncode == Exit.usage
    assert b"more than 128 MiB" in endless.stderr


def test_an_output_that_cannot_be_written_is_said() -> None:
    blob = ftrace([mem((0, PAGE))])
    with open("/dev/full", "wb") as full:
        ended = run("dt", "show", "-", given=blob, output=full.fileno())
    assert ended.returncode == Exit.unwritten
    assert ended.stderr.startswith(b"khoctl: Standard output cannot be written: ENOSPC")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(tmp_path: Path, closed: str) -> None:
    (tmp_path / "blob").write_bytes(ftrace([mem((0, PAGE))]))
    words = f"{sys.executable} -m khoctl dt"
    for command in (f"show {tmp_path}/blob", f"export {tmp_path}/blob", f"export {tmp_path}/blob -o {tmp_path}/made"):
        ended = subprocess.run(
            ["sh", "-c", f"{words} {command} {closed}"], cwd=REPOSITORY, capture_output=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (Exit.done, b"")
    assert (tmp_path / "made").read_bytes() == (tmp_path / "blob").read_bytes()


def test_a_terminal_without_blocks_is_drawn_to_in_ascii() -> None:
    blob = ftrace([mem((0, PAGE), (2 * PAGE, PAGE))])
    shown = run("dt", "show", "-", given=blob, encoding="ascii").stdout
    assert shown.isascii()
    assert b"|@ @|" in shown
    sparse = run("dt", "show", "-", given=ftrace([mem((0, PAGE), (1 << 40, PAGE))]), encoding="ascii").stdout
    assert b"|." in sparse
    assert b". under 1% used" in sparse
    assert b"@" not in sparse


def run(
    *words: str | Path, given: bytes = b"", output: int = subprocess.PIPE, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "khoctl", *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        input=given,
        stdout=output,
        stderr=subprocess.PIPE,
        timeout=DEADLINE * 2,
        check=False,
    )


def test_a_tree_is_shown_without_what_only_a_conversation_with_khod_needs() -> None:
    """It is to be as fast as dtc: to import the model alone takes a twentieth of that."""
    path = REPOSITORY / "tests/unit/corpus/seeds/trees/v3.dtb"
    words = ["-X", "importtime", "-m", "khoctl", "dt", "show", "--summary", str(path)]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "khod.trees.draw" in imported
    assert "khod.model" not in imported


def test_that_there_are_no_snapshots_breaks_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Khod(tmp_path)) as khod:
        told = khod.khoctl("dt", "list")
        monkeypatch.setenv("COLUMNS", "24")
        narrow = khod.khoctl("dt", "list")
    assert told.out.startswith("No snapshots")
    assert narrow.out.split() == told.out.split()
    assert max(map(len, narrow.out.splitlines())) <= 24
