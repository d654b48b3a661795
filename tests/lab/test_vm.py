# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual machines through the host's kexec: QEMU runs in the lab's guest, and its own guest counts on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.conftest import Online
from tests.lab.counter import LINE, write_image
from tests.lab.host import MARKER, Host, image

VERSION = "7.3.4"
DIRECTORY = "/var/lib/vm"
COMMAND = ["qemu-system-x86_64", "-machine", "q35", "-m", "64M", "-accel", "tcg", "-display", "none", "-nodefaults"]
COUNT_SECONDS = 60


def with_vms(host: Host, tmp_path: Path, *names: str) -> Host:
    """Start a guest that counts for each name, supervised by khod-vm; their numbers are in DIRECTORY/NAME."""
    host.guest.wait_online()
    host.guest.put(f"{DIRECTORY}/counter", write_image(tmp_path / "counter").read_bytes())
    for name in names:
        serial = ["-chardev", f"file,id=serial,path={DIRECTORY}/{name},append=on", "-serial", "chardev:serial"]
        words = [*COMMAND, "-bios", f"{DIRECTORY}/counter", *serial]
        host.guest.put(f"/etc/kho/vm.d/{name}.toml", f"command = {json.dumps(words)}\ntimeout = 120\n")
    host.shell(f"systemctl enable -q --now {' '.join(f'khod-vm@{name}' for name in names)}; sync")
    for name in names:
        counts_on(host, name)
    return host


def read_numbers(host: Host, name: str) -> list[int]:
    lines = host.shell(f"cat {DIRECTORY}/{name}").split("\n")[:-1]
    assert all(map(LINE.fullmatch, lines)), lines
    return [int(line, 16) for line in lines]


def counts_on(host: Host, name: str) -> list[int]:
    """Wait until a guest has counted on; its numbers, of which none came twice and none is missing."""
    before = len(host.shell(f"cat {DIRECTORY}/{name} 2>/dev/null", check=False).split())
    host.shell(
        f"timeout {COUNT_SECONDS} sh -c 'until [ $(wc -l < {DIRECTORY}/{name}) -gt {before + 2} ]; do sleep 0.2; done'"
        f" || {{ systemctl status khod-vm@{name}; journalctl -b -u khod-vm@{name}; exit 1; }}"
    )
    numbers = read_numbers(host, name)
    assert numbers == list(range(1, len(numbers) + 1))
    return numbers


@pytest.mark.parametrize("how", ["orderly", "now"])
def test_a_guest_counts_on_in_the_next_kernel(online: Online, tmp_path: Path, how: str) -> None:
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    now = ["--now"] if how == "now" else []
    assert host.guest.kexec(argv=("khoctl", "kexec", *image(VERSION), "--append", MARKER, *now)).how == "kexec"
    verdict = json.loads(host.khoctl("verify", "--json").stdout)["verdict"]
    assert "one" in verdict["arrived"]
    counts_on(host, "one")
    compared = next(check for check in verdict["checks"] if check["name"] == "contents one")
    assert compared["result"] == "passed"
    print(compared["evidence"])
