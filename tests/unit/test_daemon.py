# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod as a process on its embedded kernel: signals, restarts, reloads, the jump."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.model import Phase
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, call, khoctl, reply

# What systemd's child does between fork and exec for a unit with a socket.
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "khod", *sys.argv[2:]])
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Khod]]:
    """Start khods one after the other in the same place."""
    started: list[Khod] = []
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)

    def another() -> Khod:
        started.append(Khod(tmp_path))
        return started[-1]

    yield another
    for khod in started:
        khod.close()


def loaded(khod: Khod) -> None:
    """Bring a khod to `loaded`."""
    files = [os.open(khod.directory / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
    khod.ask("Kexec", files=files, kernel={"image": 0, "initrds": [1]}, load_only=True)
    for fd in files:
        os.close(fd)
    assert khod.active
    assert khod.loaded


def producer(khod_directory: Path) -> Path:
    """Configure a producer that notes what it is told."""
    told = khod_directory / "told"
    directory = khod_directory / "root/etc/kho/producers.d"
    directory.mkdir(parents=True)
    lines = [f'{verb} = ["/bin/sh", "-c", "echo {verb} >> {told}"]' for verb in ("prepare", "freeze", "thaw", "cancel")]
    (directory / "vm.toml").write_text("\n".join(lines))
    return told


def test_the_two_commands_take_the_host_to_the_next_kernel(start: Callable[[], Khod]) -> None:
    khod = start()
    before = khod.kernel.read_file("/proc/sys/kernel/random/boot_id")
    assert khod.khoctl("activate").code == Exit.done
    assert khod.active
    shown = khod.khoctl("dt", "show")
    assert shown.code == Exit.done
    assert "ftrace" in shown.out
    jumped = khod.khoctl(
        "kexec", "--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd", "--append", "marker=1"
    )
    assert jumped.code == Exit.done, jumped.err
    khod.word("READY=1")  # the khod of the second kernel
    assert khod.kernel.read_file("/proc/sys/kernel/random/boot_id") != before
    assert "marker=1" in khod.kernel.read_file("/proc/cmdline").decode().split()
    status = khod.khoctl("status")
    assert status.code == Exit.done
    assert "verified" in status.out
    for side in ("in", "snapshot"):
        assert khod.khoctl("dt", "export", "--side", side, "-o", khod.directory / side).code == Exit.done
    arrived = (khod.directory / "in").read_bytes()
    assert arrived == (khod.directory / "snapshot").read_bytes()
    assert arrived == khod.kernel.read_file("/sys/firmware/kho/dt")


def watching(khod: Khod) -> socket.socket:
    """Connect a client to which khod tells all that happens."""
    client = khod.connect()
    client.sendall(b'{"method": "io.kho.Handover.Monitor", "more": true}\0')
    assert reply(client)["continues"]
    return client


def test_a_client_that_watches_leaves_no_complaint_of_python_s_in_the_journal(start: Callable[[], Khod]) -> None:
    khod = start()
    with watching(khod), khod.connect() as operator:
        loaded(khod)
        call(operator, "Kexec")  # no answer comes: this khod ends with its kernel
        khod.word("READY=1")  # the khod of the second kernel
    with watching(khod) as client:
        assert khod.end(signal.SIGTERM) == 0
        while reply(client):
            pass
    said = khod.errors.read_text()
    for complaint in ("Warning", "never awaited", "Traceback", "was destroyed"):
        assert complaint not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_while_active_rolls_back(start: Callable[[], Khod], tmp_path: Path, number: int) -> None:
    told = producer(tmp_path)
    khod = start()
    khod.ask("Activate")
    assert khod.end(signal.Signals(number)) == 0
    assert not khod.active
    assert khod.record.phase is Phase.idle
    assert told.read_text().split() == ["prepare", "freeze", "thaw", "cancel"]


def test_sigterm_while_loaded_unloads_too(start: Callable[[], Khod]) -> None:
    khod = start()
    loaded(khod)
    assert khod.end(signal.SIGTERM) == 0
    assert not khod.active
    assert not khod.loaded


def test_sigterm_that_cannot_put_everything_back_says_so(start: Callable[[], Khod]) -> None:
    khod = start()
    loaded(khod)
    khod.kernel.set_fault("unload_errno", 16)
    assert khod.end(signal.SIGTERM) == Exit.not_rolled_back
    assert "EBUSY" in khod.errors.read_text() or "busy" in khod.errors.read_text()
    assert "Traceback" not in khod.errors.read_text()
    assert khod.record.phase is Phase.failed


@pytest.mark.parametrize("at", ["active", "loaded"])
def test_sigkill_then_a_new_khod_puts_everything_back(start: Callable[[], Khod], tmp_path: Path, at: str) -> None:
    told = producer(tmp_path)
    khod = start()
    if at == "active":
        khod.ask("Activate")
    else:
        loaded(khod)
    khod.end(signal.SIGKILL)
    assert khod.active
    assert khod.loaded is (at == "loaded")

    khod = start()
    assert not khod.active
    assert not khod.loaded
    status = khod.khoctl("status", "--json")
    assert status.code == Exit.done
    assert status.json["phase"] == "idle"
    assert told.read_text().split() == ["prepare", "freeze", "thaw", "cancel"]


def test_a_second_khod_does_not_take_a_live_handover_away(start: Callable[[], Khod], tmp_path: Path) -> None:
    """The table of the design: the record is rolled back where the daemon died, and this one did not."""
    khod = start()
    khod.ask("Activate")
    second = subprocess.run(
        khod.command(), cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert second.returncode == Exit.refused
    assert second.stderr
    assert "Traceback" not in second.stderr
    assert khod.active
    assert khoctl(tmp_path / "socket", "status", "--json").json["phase"] == "active"


def test_a_socket_left_by_a_khod_that_was_killed_is_no_obstacle(start: Callable[[], Khod]) -> None:
    start().end(signal.SIGKILL)
    assert start().khoctl("status").code == Exit.done


def test_reload_takes_a_good_configuration_and_keeps_the_old_one_over_a_bad_one(
    start: Callable[[], Khod], tmp_path: Path
) -> None:
    khod = start()
    config = tmp_path / "root/etc/kho/khod.toml"
    config.write_text('[policy]\nafter_daemon_died = "resume"\nmax_failed_activations = 1\n')
    khod.process.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in khod.word("RELOADING=1")
    khod.word("READY=1")
    khod.kernel.set_fault("veto", 1)
    assert khod.khoctl("activate").code == Exit.failed
    assert khod.khoctl("activate").code == Exit.refused, "the new bound of one holds"

    config.write_text("[policy]\nmax_failed_activations = 9\nmax_failed_activatoins = 3\n")
    khod.process.send_signal(signal.SIGHUP)
    khod.word("RELOADING=1")
    khod.word("READY=1")
    assert khod.khoctl("activate").code == Exit.refused, "the old bound of one still holds"
    said = khod.errors.read_text()
    assert f"{config}:3" in said
    assert "max_failed_activatoins" in said


@pytest.mark.parametrize("text", ["[polcy]\n", "x = \n", "[access]\ngroup = 3\n"])
def test_a_wrong_configuration_at_the_start_is_a_sentence_and_exit_code_2(tmp_path: Path, text: str) -> None:
    (tmp_path / "root/etc/kho").mkdir(parents=True)
    (tmp_path / "root/etc/kho/khod.toml").write_text(text)
    khod = Khod(tmp_path, ready=False)
    try:
        assert khod.process.wait(DEADLINE) == Exit.usage
        said = khod.errors.read_text()
        assert "khod.toml:" in said
        assert "Traceback" not in said
    finally:
        khod.close()


def test_the_status_text_names_the_phase(start: Callable[[], Khod]) -> None:
    khod = start()
    khod.ask("Activate")
    assert "STATUS=" in khod.word("serializ")


def test_the_first_request_that_starts_khod_is_answered(tmp_path: Path) -> None:
    """Socket activation: the call waits in the socket that systemd holds before khod is even executed."""
    (tmp_path / "state").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(str(tmp_path / "socket"))
        held.listen()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(DEADLINE)
        client.connect(str(tmp_path / "socket"))
        client.sendall(b'{"method": "io.kho.Handover.Activate", "parameters": {}}\0')
        flags = ["--root", tmp_path / "root", "--state", tmp_path / "state", "--simulate", tmp_path / "kernel"]
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(held.fileno()), *map(str, flags)],
            cwd=REPOSITORY,
            env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "varlink", "PYTHONPATH": str(REPOSITORY)},
            pass_fds=[held.fileno()],
        )
    try:
        with client:
            assert "error" not in (answer := reply(client))
            assert answer["parameters"]["status"]["phase"] == "active"
    finally:
        process.kill()
        process.wait()


def test_a_jump_that_comes_back_is_told_with_its_exit_code(start: Callable[[], Khod]) -> None:
    khod = start()
    khod.kernel.set_fault("reboot_errno", 16)
    ended = khod.khoctl("kexec", "--now", "--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    assert ended.code == Exit.failed
    assert "EBUSY" in ended.err
    assert not khod.active
    assert not khod.loaded


def test_a_cold_boot_is_told_with_its_exit_code(start: Callable[[], Khod]) -> None:
    khod = start()
    khod.kernel.set_fault("cold", True)
    khod.khoctl("kexec", "--now", "--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    khod.word("READY=1")
    status = khod.khoctl("status")
    assert status.code == Exit.degraded
    assert "cold boot" in status.out


def test_a_client_that_goes_away_does_not_end_what_it_began(start: Callable[[], Khod], tmp_path: Path) -> None:
    told = producer(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "root/etc/kho/producers.d/slow.toml").write_text(f'freeze = ["/bin/sh", "-c", "cat {fifo}"]\n')
    khod = start()
    with khod.connect() as client:
        client.sendall(b'{"method": "io.kho.Handover.Activate", "parameters": {}}\0')
        khod.word("stopping their work. Waiting for slow")
    fifo.write_text("go on\n")
    khod.word("activate took")
    with khod.connect() as client:
        assert call(client, "Status")["parameters"]["status"]["phase"] == "active"
    assert told.read_text().split() == ["prepare", "freeze"]
