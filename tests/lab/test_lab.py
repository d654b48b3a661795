# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab itself: one guest through a kexec and a reset, and what the lab says when something is lost."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.lab import cache, disk
from tests.lab.accel import machine_arguments
from tests.lab.agent import Agent
from tests.lab.conftest import Boot, Find, usual
from tests.lab.errors import CommandFailed, GuestLost, LabError, WaitTimeout
from tests.lab.guest import Guest
from tests.lab.kernels import look
from tests.lab.machine import Json, Machine

KHO = "kho=on liveupdate=on"
LOAD = ["kexec", "-s", "-l", f"{disk.KERNELS}/7.3.4/bzImage", f"--initrd={disk.INITRD}"]


def check_commands(guest: Guest) -> None:
    """Exit status, both streams, standard input and environment come through; several commands run at once."""
    script = "read line; echo out $line $WORD; echo err >&2; exit 3"
    result = guest.run(["sh", "-c", script], check=False, input="in\n", env={"WORD": "word"})
    assert (result.rc, result.stdout, result.stderr) == (3, "out in word\n", "err\n")
    with pytest.raises(CommandFailed, match=r"exit status 1") as failed:
        guest.run(["false"])
    assert failed.value.result.rc == 1
    with pytest.raises(LabError, match="No such file"):
        guest.run(["/no/such/program"])
    with pytest.raises(LabError, match=r"still running after 0\.5 s"):
        guest.run(["sleep", "60"], timeout=0.5)

    guest.run(["mkfifo", "/run/meeting"])
    reader = guest.start(["cat", "/run/meeting"])
    guest.run(["sh", "-c", "echo both > /run/meeting"])
    assert reader.wait(30).stdout == "both\n"


def check_files(guest: Guest) -> None:
    """A file of more than one chunk comes back as it went, and a sysfs file can be read though its size says 0."""
    data = bytes(range(256)) * 5000
    guest.put("/var/lib/lab/new/file", data, mode=0o755)
    assert guest.get("/var/lib/lab/new/file") == data
    assert guest.run(["stat", "-c", "%a", "/var/lib/lab/new/file"]).stdout == "755\n"
    assert guest.get("/sys/kernel/kexec_loaded") == b"0\n"
    with pytest.raises(LabError, match="FileNotFoundError"):
        guest.get("/no/such/file")


@pytest.mark.proof
def test_guest_through_kexec_and_reset(boot: Boot, plain_disk: Path) -> None:
    guest = boot("7.3.4", disk=plain_disk, cmdline_extra=KHO)
    assert guest.wait_online() == "running"
    check_commands(guest)
    check_files(guest)
    first = guest.boot_id
    assert guest.hellos[0].how == "power-on"

    # A marker that only the second kernel's command line has: no reset could bring it there.
    guest.run([*LOAD, "--reuse-cmdline", "--append=lab.second=1"])
    second = guest.kexec()
    assert second.boot_id != first
    assert "lab.second=1" in second.cmdline.split()
    assert second.how == "kexec"
    assert "KHO: found kexec handover data" in guest.run(["dmesg"]).stdout
    guest.wait_console("KHO: found kexec handover data", timeout=1)
    guest.run(["sh", "-c", "echo durable > /var/lib/lab/durable; sync"])

    third = guest.reset()
    assert third.boot_id not in (first, second.boot_id)
    assert "lab.second=1" not in third.cmdline.split()
    assert third.how == "reset"
    assert "KHO: found kexec handover data" not in guest.run(["dmesg"]).stdout
    assert guest.get("/var/lib/lab/durable") == b"durable\n"

    with pytest.raises(WaitTimeout, match=r"waited 0\.1 s for 'never' on the console"):
        guest.wait_console("never", timeout=0.1)
    guest.qmp("quit")
    with pytest.raises(GuestLost, match="QEMU ended"):
        guest.wait_reboot(third.boot_id)


@pytest.mark.lab
def test_each_saved_guest_goes_on_from_the_same_point(kernels: Find, plain_disk: Path, tmp_path: Path) -> None:
    boots = []
    for name in ("first", "second"):
        with usual(kernels("7.3.4"), plain_disk, tmp_path / name) as guest:
            boots.append(guest.boot_id)
            assert "multi-user.target" in guest.console()  # of the boot that was saved
            assert abs(int(guest.run(["date", "+%s"]).stdout) - time.time()) < 60
            guest.run(["sh", "-ec", "test ! -e /var/lib/been; touch /var/lib/been; sync"])
    assert boots[0] == boots[1]


@pytest.mark.lab
def test_panic_is_a_lost_guest(kernels: Find, tmp_path: Path) -> None:
    arguments = [
        *machine_arguments("tcg"),
        "-m",
        "512",
        "-kernel",
        str(kernels("7.3.4").bzimage),
        "-append",
        "console=ttyS0 panic=-1",
        "-no-reboot",
    ]
    with (
        Machine(arguments, tmp_path / "console.log") as machine,
        pytest.raises(GuestLost, match=r"(?s)the kernel panicked .* the agent.*Unable to mount root fs"),
    ):
        machine.wait("the agent", 60, lambda: None)


def test_agent_skips_torn_lines_and_requests_for_another_boot() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = threading.Thread(target=Agent(theirs.fileno(), "this-boot").serve, daemon=True)
        agent.start()
        run = {"op": "run", "argv": ["true"]}
        ours.sendall(b'"op": "run", "argv": ["half a line"]}\n17\n\n')
        ours.sendall(json.dumps({"id": "1", "boot_id": "earlier-boot", **run}).encode() + b"\n")
        ours.sendall(json.dumps({"id": "2", "boot_id": "this-boot", **run}).encode() + b"\n")
        lines = ours.makefile("rb")
        said: list[Json] = []
        while not said or "id" not in said[-1]:
            if line := lines.readline().strip():
                said.append(json.loads(line))
        assert said[0]["hello"]["boot_id"] == "this-boot"
        assert [message.get("id") for message in said] == [None, "2"]
        assert said[1]["rc"] == 0
        ours.shutdown(socket.SHUT_RDWR)
        agent.join(30)
        assert not agent.is_alive()


def test_a_kernel_without_its_config_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHO_LAB_KERNELS", str(tmp_path))
    monkeypatch.setenv("KHO_LAB_CACHE", str(tmp_path / "cache"))
    assert look("1.2.3") is None
    (tmp_path / "1.2.3").mkdir()
    (tmp_path / "1.2.3/bzImage").write_bytes(b"")
    with pytest.raises(LabError, match="has no config next to it"):
        look("1.2.3")


def test_what_another_process_removes_meanwhile_is_no_concern_of_a_prune(tmp_path: Path) -> None:
    for number, name in enumerate(["disk-old", "disk-new"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number + 1, number + 1))
    (tmp_path / "disk-used").touch()
    os.utime(tmp_path / "disk-used", (time.time() - 60,) * 2)  # by the tests of another tree
    (tmp_path / "disk-newest").touch()
    (tmp_path / "disk-gone").symlink_to("nowhere")  # in the listing, and not there when it is looked at
    cache.prune(tmp_path, "disk-*", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"disk-newest", "disk-used"}
