# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's store: what was sent to it outlives khod."""

import os
import time

import pytest
import systemd.daemon

from khod.systemd import fdstore
from khod.systemd.fdstore import ServiceManager


def test_a_descriptor_is_sent_before_anybody_relies_on_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A khod that was killed between the retrieval of a session and this message had freed what the session holds."""
    sent: list[str] = []

    def notify(message: str, fds: list[int]) -> None:
        time.sleep(0.05)  # the machine is busy
        os.fstat(*fds)
        sent.append(message)

    monkeypatch.setattr(systemd.daemon, "notify", notify)
    store, fd = ServiceManager(), os.memfd_create("session")
    store.store_fd("khod-1", fd)
    os.close(fd)
    store.wait_sent()
    assert sent == ["FDSTORE=1\nFDNAME=khod-1\nFDPOLL=0"]


def test_a_service_manager_that_takes_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = os.pipe()
    monkeypatch.setattr(systemd.daemon, "notify", lambda _message, fds: os.read(gate[0], len(fds)))
    monkeypatch.setattr(fdstore, "SENT_SECONDS", 0.05)
    store = ServiceManager()
    store.store_fd("khod-1", gate[0])
    store.wait_sent()
    os.write(gate[1], b"x")
