# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever watches a host from elsewhere stays through its jump: khoctl beside the test, at a forwarded socket."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from khoctl import follow
from tests.lab import forward
from tests.lab.conftest import Boot
from tests.lab.host import KHO, TRACE, Host, image
from tests.unit.khods import REPOSITORY

PORT = 7777
MINUTES = 300.0
"""Seconds for the shutdown, the jump and the boot, without KVM."""
UNIT = f"""\
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/forward.py {PORT}
Restart=on-failure
[Install]
WantedBy=multi-user.target
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
    return port


@contextmanager
def forwarded(port: int, path: Path) -> Iterator[None]:
    """The guest's khod at a socket of this host, for as long as its end of the forwarding runs."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        connect = partial(socket.create_connection, ("127.0.0.1", port))
        serving = threading.Thread(target=forward.forward, args=(listening, connect))
        serving.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            serving.join()


@pytest.mark.proof
def test_a_monitor_elsewhere_stays_through_the_jump(boot: Boot, tmp_path: Path) -> None:
    """After an orderly shutdown, which ends khod, and after a jump at once, which leaves its connections open."""
    port = free_port()
    network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-{forward.ADDRESS}:{PORT}"
    extra = ("-netdev", network, "-device", "virtio-net-pci,netdev=net")
    host = Host(boot("7.3.4", cmdline_extra=f"{KHO} {TRACE}", qemu_extra=extra))
    host.guest.wait_online()
    host.guest.put("/usr/local/lib/forward.py", Path(forward.__file__).read_bytes())
    host.guest.put("/etc/systemd/system/forward.service", UNIT)
    host.shell("systemctl enable -q --now forward.service")

    with forwarded(port, tmp_path / "socket"):
        for words in ((), ("--now",)):
            command = [sys.executable, "-m", "khoctl", f"--socket={tmp_path / 'socket'}", "--timeout", str(MINUTES)]
            with subprocess.Popen(
                [*command, "monitor", "--json"],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as monitor:
                try:
                    assert monitor.stdout is not None
                    assert json.loads(monitor.stdout.readline())["phase"] in ("idle", "verified")
                    host.guest.kexec(argv=("khoctl", "kexec", *image("7.3.4"), *words))
                    out, err = monitor.communicate(timeout=MINUTES)
                finally:
                    monitor.kill()
            shown = [json.loads(line) for line in out.splitlines()]
            notes = [one["message"] for one in shown if one.get("kind") == "note"]
            assert follow.IN_JUMP in notes
            assert any(note.startswith(follow.OTHER_BOOT) for note in notes), notes
            assert (monitor.returncode, shown[-1]["phase"]) == (0, "verified"), (shown[-1], err)
            assert shown[-1]["boot_id"] == host.guest.boot_id
            assert shown[-1]["kernel_release"].startswith("7.3.4")
