# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host that has jumped, and whose producer waits for what it left; khod is started as systemd starts it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from khod.handover.record import Store
from khod.model import Phase, Step
from khod.producers.barrier import Verb
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, reply

NEXT = b'{"method": "io.kho.Producer.Next"}\0'
READY = b'{"method": "io.kho.Producer.Next", "parameters": {"serial": %d, "answer": "ready"}}\0'
REGISTER = b'{"method": "io.kho.Producer.Register", "parameters": {"name": "waiting", "version": 1}}\0'
STARTER = "from khod.__main__ import main; main()"
"""/usr/bin/khod."""
EARLY_STARTER = """\
from khod.__main__ import run_daemon
from khod.early.kernel import HostKernel
from khod.early.restore import begin_early_restore
from khod.systemd.passed import listen_fds_by_name
passed = listen_fds_by_name()
run_daemon(passed, begin_early_restore("{at}/state", "{at}", passed, HostKernel("{at}/kernel")))
"""
"""The same for a simulated kernel in the directory `at`, whose files are real ones."""


def jump_with_producer(directory: Path) -> None:
    """Leave a host in this directory that has jumped; its producer has taken nothing back."""
    (directory / "vmlinuz").write_bytes(bzimage())
    (directory / "initrd").write_bytes(CPIO)
    khod = Khod(directory)
    try:
        with khod.connect() as producer:
            producer.sendall(REGISTER)
            reply(producer)
            producer.sendall(NEXT)
            images = [f"--image={directory / 'vmlinuz'}", f"--initrd={directory / 'initrd'}"]
            operator = subprocess.Popen(
                [sys.executable, "-m", "khoctl", f"--socket={khod.socket}", "kexec", "--now", *images],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _ in ("prepare", "freeze"):
                producer.sendall(READY % reply(producer)["parameters"]["serial"])
            khod.word("READY=1")  # of the khod in the next kernel
            operator.wait(DEADLINE)
        assert [claim.name for claim in khod.record.claims] == ["waiting"]
    finally:
        khod.close()
    (directory / "notify").unlink()
    (directory / "socket").unlink()


def put_back_departure(directory: Path) -> None:
    """Put the record back to what the khod before the jump has left: none has started in this boot."""
    store = Store(directory / "state")
    record = store.read()
    assert record is not None
    left = tuple(replace(claim, told=Verb.freeze.value) for claim in record.claims)
    done = (Step.prepare, Step.freeze, Step.activate, Step.load, Step.execute)
    store.write(
        replace(record, phase=Phase.executing, done=done, boot_id="before", arrived_run="", producers=left, claims=())
    )


@contextmanager
def start_khod(
    directory: Path, listening: socket.socket, starter: str = STARTER
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start khod with the socket on which a producer may wait already; it tells `notify` in the directory."""
    flags = [f"--root={directory}/root", f"--state={directory}/state", f"--socket={directory}/socket"]
    argv = [sys.executable, "-c", starter, *flags, f"--simulate={directory}/kernel"]
    (directory / "root").mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "WATCHDOG_USEC"}
    passed = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "varlink", "NOTIFY_SOCKET": f"{directory}/notify"}
    with (directory / "stderr").open("ab") as errors:
        khod = subprocess.Popen(
            ["/bin/sh", "-c", 'exec 3<&0 0</dev/null; LISTEN_PID=$$ exec "$@"', "sh", *argv],
            cwd=REPOSITORY,
            env=environment | passed,
            stdin=listening.fileno(),
            stderr=errors,
        )
    try:
        yield khod
    finally:
        khod.kill()
        khod.wait()


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """Make the socket that systemd would have made."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield listening


@contextmanager
def call_early(path: Path) -> Iterator[socket.socket]:
    """Connect the producer, which registers; nobody may answer yet."""
    with socket.socket(socket.AF_UNIX) as producer:
        producer.settimeout(DEADLINE)
        producer.connect(str(path))
        producer.sendall(REGISTER)
        yield producer
