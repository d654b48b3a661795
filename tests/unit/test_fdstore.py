# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's store: what was sent to it outlives khod."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from khod.concurrency.worker import Worker
from khod.systemd import fdstore, notification, notifier
from khod.systemd.fdstore import ServiceManager
from tests.unit.khods import until
from tests.unit.unread import GOES_ON, send_until_it_blocks


def test_a_descriptor_is_sent_before_anybody_relies_on_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A khod that was killed between the retrieval of a session and this message had freed what the session holds."""
    sent: list[str] = []

    def notify(message: str, fds: list[int]) -> None:
        time.sleep(0.05)  # the machine is busy
        os.fstat(*fds)
        sent.append(message)

    monkeypatch.setattr(notification, "send_notification", notify)
    store, fd = ServiceManager(), os.memfd_create("session")
    store.store_fd("khod-1", fd)
    os.close(fd)
    store.wait_sent()
    assert sent == ["FDSTORE=1\nFDNAME=khod-1\nFDPOLL=0"]


def test_a_service_manager_that_takes_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = os.pipe()
    monkeypatch.setattr(notification, "send_notification", lambda _message, fds: os.read(gate[0], len(fds)))
    monkeypatch.setattr(fdstore, "SENT_SECONDS", 0.05)
    store = ServiceManager()
    store.store_fd("khod-1", gate[0])
    store.wait_sent()
    os.write(gate[1], b"x")


def test_khod_goes_on_while_the_service_manager_reads_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        prepare = "from khod.systemd.notification import send_notification"
        send = 'send_notification("WATCHDOG=1")'
        assert send_until_it_blocks(prepare, send, NOTIFY_SOCKET=str(tmp_path / "notify")) == GOES_ON


def test_a_queued_notification_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        own = Worker(
            "own-notify", "The service manager", max_waiting=notifier.MAX_WAITING
        )  # what waits is sent to no other
        monkeypatch.setattr(notifier, "start_notifier", lambda: own)
        for number in range(2 * notifier.MAX_WAITING):  # more than its socket takes, and more than are kept
            notifier.notify_manager(f"STATUS={number}")
        assert manager.recv(64) == b"STATUS=0"
    own.close()
    until(lambda: not any(thread.name.startswith("own-notify") for thread in threading.enumerate()), None)


def test_a_notification_reaches_the_service_manager_with_its_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.memfd_create("session")
    for path, shown in ((str(tmp_path / "notify"), str(tmp_path / "notify")), (f"\0{tmp_path}", f"@{tmp_path}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(path)
            monkeypatch.setenv("NOTIFY_SOCKET", shown)
            notification.send_descriptor("khod-1", fd)
            notification.send_notification("READY=1")
            text, (passed,), _, _ = socket.recv_fds(manager, 4096, 2)
            assert text == b"FDSTORE=1\nFDNAME=khod-1\nFDPOLL=0"
            assert os.fstat(passed).st_ino == os.fstat(fd).st_ino
            assert manager.recv(4096) == b"READY=1"
            os.close(passed)
    monkeypatch.delenv("NOTIFY_SOCKET")
    notification.send_notification("READY=1")
    os.close(fd)
