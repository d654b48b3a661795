# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod says of the kernel's own selftest, whose first stage leaves a process that holds two LUO sessions."""

import pytest

from tests.lab import selftest
from tests.lab.conftest import Online
from tests.lab.host import Host, image

pytestmark = pytest.mark.proof  # test_unregistered has a smaller one of each, with a program of its own
PROGRAM = "luo_kexec_simple"
SESSIONS = {"test-session", "kexec_simple_state"}


@pytest.fixture
def host(online: Online) -> Host:
    """Give a host where the first stage has run."""
    made = Host(online(selftest.VERSION))
    made.guest.put(f"/lab/{PROGRAM}", selftest.build(PROGRAM).read_bytes(), mode=0o755)
    made.shell(f"/lab/{PROGRAM} -s 1")
    return made


def test_both_stages_pass_with_a_jump_at_once(host: Host) -> None:
    refused = host.checks(code=3)["sessions"]
    assert refused["result"] == "fail"
    for word in (*SESSIONS, PROGRAM):
        assert word in refused["evidence"]
    assert host.checks("--now")["sessions"]["result"] == "passed"

    assert host.guest.kexec(argv=("khoctl", "kexec", *image(selftest.VERSION), "--now")).how == "kexec"

    assert "SIMPLE KEXEC TEST PASSED" in host.shell(f"/lab/{PROGRAM} -s 2")


def test_an_orderly_jump_loses_them_and_the_verdict_says_so(host: Host) -> None:
    host.configure("sessions", '[checks]\nsessions = "off"\n')

    host.kexec(selftest.VERSION)

    host.khoctl("verify", code=7)
    status = host.status(7)
    assert status["phase"] == "degraded"
    assert set(status["verdict"]["missing"]) == {f"session {name}" for name in SESSIONS}
    assert all(name in status["last_error"] for name in SESSIONS)
