# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO sessions that nobody told khod of: what it says before the jump is what comes of them, on a real kernel."""

from typing import Any

import pytest

from tests.lab.conftest import Online
from tests.lab.host import Host, image

VERSION = "7.3.4"
LONG = "n" * 60
"""Longer than the kernel shows a name in a link."""

HOLD = """\
import os, signal, sys
from pathlib import Path
from khod.abi import liveupdate as luo
from systemd import daemon

kept = []
for name in sys.argv[2:]:
    device = luo.open_device(Path("/dev/liveupdate"))
    kept.append((luo.retrieve_session if sys.argv[1] == "take" else luo.create_session)(device, name))
    os.close(device)
    if sys.argv[1] != "take":
        memory = os.memfd_create("lab", os.MFD_CLOEXEC)
        os.write(memory, name.encode())
        luo.preserve_fd(kept[-1], memory, 1)
    if sys.argv[1] == "store":
        daemon.notify(f"FDSTORE=1\\nFDNAME={name}", fds=[kept[-1]])
print(" ".join(luo.get_name(session) for session in kept), flush=True)
daemon.notify("READY=1")
signal.pause()
"""
SERVICE = """\
[Service]
Type=notify
FileDescriptorStoreMax=8
FileDescriptorStorePreserve={preserve}
ExecStart=/usr/bin/python3 /lab/hold.py {words}
"""


def start(host: Host, unit: str, *words: str, preserve: str = "restart") -> None:
    """Start a service that makes sessions, puts them into its store, or takes those that came."""
    host.guest.put("/lab/hold.py", HOLD)
    text = SERVICE.format(preserve=preserve, words=" ".join(words))
    host.guest.put(f"/etc/systemd/system/{unit}.service", text)
    host.shell(f"systemctl daemon-reload; systemctl start {unit}; sync")


def verdict(host: Host, code: int) -> dict[str, Any]:
    """What the next kernel's khod says, once it has taken stock."""
    host.khoctl("verify", code=code)
    return host.status(code)


def fates(host: Host) -> dict[str, str]:
    return {found["name"]: found["fate"] for found in host.status()["sessions"]}


def test_an_orderly_shutdown_ends_what_no_store_keeps(online: Online) -> None:
    host = Host(online(VERSION))
    start(host, "plain", "make", "test-session", LONG)
    start(host, "kept", "store", "stored", preserve="yes")
    start(host, "emptied", "store", "dropped")
    found = host.checks(code=3)["sessions"]
    assert found["result"] == "fail"
    for word in ("test-session", LONG, "dropped", "plain.service"):
        assert word in found["evidence"]
    assert fates(host) == {"test-session": "lost", LONG: "lost", "stored": "kept", "dropped": "lost"}
    assert host.checks("--now")["sessions"]["result"] == "passed"

    host.configure("sessions", '[checks]\nsessions = "off"\n')
    host.kexec(VERSION)

    status = verdict(host, 7)
    assert status["phase"] == "degraded"
    lost = {f"session {name}" for name in ("test-session", LONG, "dropped")}
    assert set(status["verdict"]["missing"]) == lost
    assert "session stored" in status["verdict"]["arrived"]
    assert "test-session" in status["last_error"]


@pytest.mark.proof
def test_a_jump_at_once_keeps_them_for_their_owner(online: Online) -> None:
    host = Host(online(VERSION))
    start(host, "plain", "make", "test-session", "again")
    assert host.guest.kexec(argv=("khoctl", "kexec", *image(VERSION), "--now")).how == "kexec"

    status = verdict(host, 0)
    assert status["phase"] == "verified"
    assert status["verdict"]["unknown"] == ["session again", "session test-session"]
    assert "all state" not in status["summary"]
    start(host, "taker", "take", "test-session")
    start(host, "plain", "make", "again")
    assert host.checks(code=3)["sessions"]["result"] == "fail"
    (taken,) = [found for found in host.status()["sessions"] if found["name"] == "test-session"]
    assert taken["incoming"]
    assert fates(host)["again"] == "lost"
