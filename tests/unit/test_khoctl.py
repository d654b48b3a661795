# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl as a process: each refusal is a sentence on what, where and what to do, with its exit code; --json is JSON."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from khoctl.app import MODULES, app
from khod import __version__
from khod.errors import Exit
from tests.unit.images import CMDLINE_SIZE, CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, call, cli, khoctl


@pytest.fixture(scope="module")
def khod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Khod]:
    """One khod, and every kind of file, for the whole file of tests."""
    directory = tmp_path_factory.mktemp("khod")
    (directory / "vmlinuz").write_bytes(bzimage())
    (directory / "initrd").write_bytes(CPIO)
    (directory / "directory").mkdir()
    os.mkfifo(directory / "fifo")
    (directory / "empty").write_bytes(b"")
    (directory / "truncated").write_bytes(bzimage()[:-0x1000])
    (directory / "cut-in-the-header").write_bytes(bzimage()[:0x204])
    (directory / "elf").write_bytes(b"\x7fELF" + bytes(0x5000))
    (directory / "text").write_bytes(b"root=/dev/sda1\n" * 1000)
    (directory / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "a-socket"))
    made = Khod(directory)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _phase_stays(khod: Khod) -> Iterator[None]:
    """Whatever was refused, the phase is where it was and the kernel was not touched."""
    before = khod.ask("Status")["status"]["phase"]
    yield
    assert khod.ask("Status")["status"]["phase"] == before
    assert not khod.active
    assert not khod.loaded


def refused(ended: Answer, code: Exit, *words: str) -> None:
    """One sentence that holds `words`, on standard error, and nothing else there."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err.startswith("khoctl: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


IMAGES = [
    ("nowhere", Exit.usage, "ENOENT"),
    ("directory", Exit.usage, "directory"),
    ("fifo", Exit.usage, "FIFO"),
    ("/dev/null", Exit.usage, "character device"),
    ("a-socket", Exit.usage, ""),
    ("loop", Exit.usage, "ELOOP"),
    ("vmlinuz/below", Exit.usage, "ENOTDIR"),
    ("empty", Exit.refused, "empty"),
    ("truncated", Exit.refused, "truncated"),
    ("cut-in-the-header", Exit.refused, "x86_64"),
    ("elf", Exit.refused, "not a kernel"),
    ("text", Exit.refused, "not a kernel"),
]


@pytest.mark.parametrize(("name", "code", "word"), IMAGES)
def test_a_file_that_is_no_kernel(khod: Khod, name: str, code: Exit, word: str) -> None:
    path = khod.directory / name
    ended = khod.khoctl("kexec", "--image", path, "--initrd", khod.directory / "initrd")
    refused(ended, code, word, str(path), "image")


INITRDS = [
    ("nowhere", Exit.usage, "ENOENT"),
    ("directory", Exit.usage, "directory"),
    ("fifo", Exit.usage, "FIFO"),
    ("empty", Exit.refused, "empty"),
    ("vmlinuz", Exit.refused, "cpio"),
    ("text", Exit.refused, "cpio"),
]


@pytest.mark.parametrize(("name", "code", "word"), INITRDS)
def test_a_file_that_is_no_initrd(khod: Khod, name: str, code: Exit, word: str) -> None:
    path = khod.directory / name
    refused(
        khod.khoctl("kexec", "--image", khod.directory / "vmlinuz", "--initrd", path), code, "initrd", word, str(path)
    )


LINES = [
    (("--cmdline", "root=/dev/sda\nquiet"), "newline"),
    (("--append", "quiet\nsplash"), "newline"),
    (("--cmdline", "x" * (CMDLINE_SIZE + 1)), str(CMDLINE_SIZE)),
    (("--append", "ü" * CMDLINE_SIZE), str(CMDLINE_SIZE)),
    (("--cmdline", b"root=\xff".decode(errors="surrogateescape")), ""),
]


@pytest.mark.parametrize(("words", "said"), LINES, ids=["newline", "newline appended", "long", "long append", "bytes"])
def test_a_command_line_no_kernel_takes(khod: Khod, words: tuple[str, ...], said: str) -> None:
    files = ("--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    refused(khod.khoctl("kexec", *files, *words), Exit.usage, said, "ommand line")


def test_a_nul_in_the_command_line(khod: Khod) -> None:
    """No argument of a process can hold one: it comes over the wire."""
    with (khod.directory / "vmlinuz").open("rb") as image, khod.connect() as client:
        answer = call(client, "Kexec", files=[image.fileno()], kernel={"image": 0, "cmdline": "root=/dev/sda\0quiet"})
    assert answer["error"] == "io.kho.Handover.UsageError"
    assert "NUL" in answer["parameters"]["what"]


def test_a_descriptor_that_cannot_be_read(khod: Khod) -> None:
    with (khod.directory / "vmlinuz").open("ab") as image, khod.connect() as client:
        answer = call(client, "Kexec", files=[image.fileno()], kernel={"image": 0, "image_name": "/boot/vmlinuz"})
    assert answer["error"] in ("io.kho.Handover.UsageError", "io.kho.Handover.Refused")
    assert "EBADF" in answer["parameters"]["what"]
    assert answer["parameters"]["where"] == "/boot/vmlinuz"


def test_a_file_over_the_bound_is_refused_by_its_size_alone(khod: Khod) -> None:
    with (khod.directory / "huge").open("w+b") as image, khod.connect() as client:
        image.write(struct.pack("<I", 0))
        image.truncate(1 << 40)  # sparse: to read it would take hours
        answer = call(client, "Kexec", files=[image.fileno()], kernel={"image": 0})
    assert answer["error"] == "io.kho.Handover.Refused"
    assert "max_size" in answer["parameters"]["remedy"]


WORDS = [
    ("activate", "now"),
    ("explode",),
    ("kexec", "--imgae", "x"),
    ("dt", "export", "out", "x.dtb"),
    ("abort", "--force=3"),
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_words_khoctl_does_not_know(khod: Khod, words: tuple[str, ...]) -> None:
    refused(khod.khoctl(*words), Exit.usage, "")
    answer = khod.khoctl(*words, "--json")
    assert answer.code == answer.json["exit_code"] == Exit.usage
    assert answer.json["error"] == "UsageError"


def test_a_word_that_is_near_is_named_once(khod: Khod) -> None:
    command = khod.khoctl("statsu").err
    assert command.count("Did you mean status?") == command.count("Did you mean") == 1
    option = khod.khoctl("kexec", "--imgae", "x").err
    assert option.count("--image") == 1
    assert "khoctl kexec -h" in option


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("prepare", "khoctl activate"),
        ("load", "khoctl kexec --load-only"),
        ("exec", "khoctl kexec"),
        ("execute", "khoctl kexec"),
        ("log", "khoctl logs"),
    ],
)
def test_a_step_that_is_no_command_is_told_what_does_it(tmp_path: Path, word: str, named: str) -> None:
    refused(cli(tmp_path / "socket", word), Exit.usage, f"'{word}'", named)
    assert named in cli(tmp_path / "socket", word, "--json").json["remedy"]


PATHS = [(), *((name,) for name in MODULES), *(("dt", name) for name in ("list", "show", "diff", "export", "validate"))]


@pytest.mark.parametrize("words", PATHS, ids=" ".join)
def test_every_command_has_a_short_help_that_is_whole(tmp_path: Path, words: tuple[str, ...]) -> None:
    ended = cli(tmp_path / "socket", *words, "-h")
    assert ended.code == Exit.done
    assert "--socket PATH" in ended.out
    assert "..." not in re.sub(r"\[.*?\]\.\.\.", "", ended.out), "a summary is cut"


def test_the_version_needs_no_khod(tmp_path: Path) -> None:
    assert cli(tmp_path / "socket", "--version").out == f"khoctl {__version__}\n"


def test_the_socket_may_be_named_after_the_command(khod: Khod, tmp_path: Path) -> None:
    assert cli(tmp_path / "nowhere", "status", f"--socket={khod.socket}").code == Exit.done
    assert cli(tmp_path / "nowhere", "producers", f"--socket={khod.socket}").code == Exit.done


@pytest.mark.parametrize("name", ["empty", "truncated"])
@pytest.mark.parametrize("role", ["image", "initrd"])
def test_a_file_that_cannot_be_used_is_a_finding_among_the_checks(khod: Khod, role: str, name: str) -> None:
    files = {"image": khod.directory / "vmlinuz", "initrd": khod.directory / "initrd", role: khod.directory / name}
    words = [word for option, path in files.items() for word in (f"--{option}", path)]
    ended = khod.khoctl("check", *words, "--json")
    results = {check["name"]: check["result"] for check in ended.json}
    assert ended.code == Exit.refused
    assert (results[role], results["kho"]) == ("fail", "passed")
    assert khod.khoctl("plan", *words).code == Exit.refused


def test_no_locale_is_ascii(khod: Khod) -> None:
    """Python takes the C locale for UTF-8; the terminal that has it does not."""
    name = khod.directory / "\u2026\u00fc"
    for locale, text in (("C", b"\\u2026\\xfc"), ("C.UTF-8", "\u2026\u00fc".encode())):
        ended = subprocess.run(
            [sys.executable, "-m", "khoctl", f"--socket={name}", "status"],
            cwd=REPOSITORY,
            env={**os.environ, "LC_ALL": locale},
            capture_output=True,
            timeout=DEADLINE,
            check=False,
        )
        assert ended.returncode == Exit.unreachable
        assert text in ended.stderr


def test_a_terminal_without_colours_gets_none(khod: Khod, monkeypatch: pytest.MonkeyPatch) -> None:
    def coloured() -> bool:
        return "\x1b" in CliRunner().invoke(app, [f"--socket={khod.socket}", "status"], color=True).stdout

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not coloured()


def test_an_answer_that_cannot_be_written_is_no_failure_of_the_operation(khod: Khod) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "khoctl", f"--socket={khod.socket}", "activate"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
            check=False,
        )
    assert khod.active
    assert khod.khoctl("abort").code == Exit.done
    assert ended.returncode == Exit.unwritten
    assert b"khoctl status" in ended.stderr


def test_options_that_contradict_each_other(khod: Khod) -> None:
    image = ("--image", khod.directory / "vmlinuz")
    refused(khod.khoctl("kexec", *image, "--cmdline", "a", "--reuse-cmdline"), Exit.usage, "--reuse-cmdline")
    refused(khod.khoctl("kexec", "--initrd", khod.directory / "initrd"), Exit.usage, "--image")
    refused(khod.khoctl("kexec"), Exit.usage, "--image")
    refused(khod.khoctl("kexec", "--profile", "nowhere"), Exit.usage, "nowhere.toml")


def test_no_tree_while_inactive(khod: Khod) -> None:
    refused(khod.khoctl("dt", "show"), Exit.refused, "khoctl activate")
    refused(khod.khoctl("dt", "show", "--side", "in"), Exit.refused)
    refused(khod.khoctl("dt", "export", "-o", khod.directory / "x"), Exit.refused)
    assert not (khod.directory / "x").exists()


@pytest.mark.parametrize("command", ["status", "check", "activate", "abort", "monitor", "verify"])
def test_khod_not_running_is_a_sentence_and_exit_code_5(tmp_path: Path, command: str) -> None:
    ended = cli(tmp_path / "socket", command)
    refused(ended, Exit.unreachable, str(tmp_path / "socket"), "not running", "systemctl start kho-handover")


def test_a_socket_nobody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    refused(khoctl(tmp_path / "socket", "status"), Exit.unreachable, str(tmp_path / "socket"))


STRANGERS = {
    "no JSON": b"220 mail.example.org ESMTP\r\n\0",
    "no UTF-8": b"\xff\0",
    "a list": b"[]\0",
    "nothing in it": b"{}\0",
    "no status": b'{"parameters": {}}\0',
    "a status of another shape": b'{"parameters": {"status": {"phase": "dreaming"}}}\0',
    "half a message": b'{"parameters": {',
    "nothing": b"",
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS.keys())
def test_something_else_listens_on_the_socket(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        bound.listen()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(cli, tmp_path / "socket", "status")
            client, _address = bound.accept()
            with client:
                assert client.recv(4096)
                client.sendall(said)
            ended = asking.result(DEADLINE)
    refused(ended, Exit.unreachable, str(tmp_path / "socket") if said.endswith(b"\0") else "closed")


def test_json_is_json_everywhere(khod: Khod) -> None:
    status = khod.khoctl("status", "--json")
    assert status.code == Exit.done
    assert (status.json["phase"], status.json["generation"]) == ("idle", "sysfs")
    checks = khod.khoctl("check", "--json")
    assert checks.code == Exit.done
    assert {check["result"] for check in checks.json} <= {"passed", "skipped"}
    abort = khod.khoctl("abort", "--json")
    assert abort.json["phase"] == "idle"
    error = khod.khoctl("kexec", "--json", "--image", khod.directory / "nowhere")
    assert error.code == Exit.usage
    assert error.json["exit_code"] == Exit.usage
    assert {"error", "what", "where", "remedy"} <= error.json.keys()
    assert error.json["where"] == str(khod.directory / "nowhere")


def test_check_says_what_it_looked_at(khod: Khod) -> None:
    ended = khod.khoctl("check")
    assert ended.code == Exit.done
    for name in ("kho", "scratch", "kexec", "disk", "producers"):
        assert name in ended.out


def test_a_warning_counts_where_the_operator_is_strict(khod: Khod) -> None:
    words = ("check", "--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    warned = [check["name"] for check in khod.khoctl(*words, "--json").json if check["result"] == "warn"]
    assert warned == ["signature"], "the simulated kernel does not say whether it requires it"
    assert khod.khoctl(*words).code == Exit.done
    assert khod.khoctl(*words, "--strict").code == Exit.refused
    assert khod.khoctl("check", "--strict").code == Exit.done


def test_a_monitor_streams_every_phase(khod: Khod) -> None:
    # A shell leaves SIGINT ignored in what it starts in the background, and that is inherited.
    heeding = ["env", "--default-signal=INT"]
    command = [*heeding, sys.executable, "-m", "khoctl", f"--socket={khod.socket}", "monitor", "--json"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as monitor:
        try:
            assert monitor.stdout is not None
            first = json.loads(monitor.stdout.readline())
            assert first["phase"] == "idle"
            khod.ask("Activate")
            khod.ask("Abort")
            phases = [first["phase"]]
            while len(phases) < 2 or phases[-1] != "idle":
                phase = json.loads(monitor.stdout.readline())["phase"]
                if phase != phases[-1]:
                    phases.append(phase)
        finally:
            monitor.send_signal(signal.SIGINT)
    expected = "idle preparing prepared freezing frozen activating active rolling_back idle"
    assert phases == expected.split()
    assert monitor.returncode == 130


def test_a_khod_that_goes_away_ends_the_monitor_with_exit_code_5(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    try:
        command = [sys.executable, "-m", "khoctl", f"--socket={khod.socket}", "monitor"]
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as monitor:
            assert monitor.stdout is not None
            assert monitor.stdout.readline()
            khod.end(signal.SIGKILL)
            _out, err = monitor.communicate(timeout=DEADLINE)
        assert monitor.returncode == Exit.unreachable
        assert "Traceback" not in err
    finally:
        khod.close()
