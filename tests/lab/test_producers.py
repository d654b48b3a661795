# SPDX-License-Identifier: LGPL-2.1-or-later
"""Producers on real kernels: what they hold arrives, and whoever refuses or changes the hardware ends it for all."""

import pytest

from tests.lab.conftest import Online
from tests.lab.host import Host
from tests.lab.store import check_arrived, fill, start_store

MEBIBYTES = 64


@pytest.mark.proof
def test_a_key_value_store_keeps_its_data_over_two_handovers(online: Online) -> None:
    """The second with khod killed and started again half-way."""
    host = Host(online("7.3.4"))
    host.guest.wait_online()
    start_store(host)
    digest = fill(host, MEBIBYTES)
    # One that does not end at SIGTERM, and while it is frozen not even gets it.
    host.guest.put("/etc/kho/producers.d/stubborn.toml", 'unit = "stubborn.service"\n')
    host.shell("systemd-run -q --unit=stubborn sh -c 'trap \"\" TERM; while :; do sleep 1; done'")

    host.kexec("7.3.4")

    assert "Waiting for process" not in host.guest.console()
    check_arrived(host, digest, MEBIBYTES)
    host.guest.put("/etc/kho/producers.d/stubborn.toml", "")
    host.guest.put("/etc/kho/khod.toml.d/resume.toml", '[policy]\nafter_daemon_died = "resume"\n')
    host.guest.run(["systemctl", "restart", "kho-handover"])
    host.khoctl("activate")
    host.guest.run(["systemctl", "kill", "--signal=SIGKILL", "kho-handover"])
    host.guest.run(["systemctl", "start", "kho-handover"])
    assert host.status()["phase"] == "active"

    host.kexec("7.3.4")

    check_arrived(host, digest, MEBIBYTES)


def test_a_kernel_without_luo_keeps_no_producer_s_files(online: Online) -> None:
    host = Host(online("6.18.15"))
    host.guest.wait_online()
    start_store(host)

    refused = host.khoctl("activate", code=4)

    assert "kv-store" in refused.stderr
    assert "was built without it" in refused.stderr
    assert host.status()["phase"] == "idle"
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"
