# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl on another host through a real jump: a guest's own sshd, and khoctl of the package on it."""

import json
from pathlib import Path

import pytest

from khoctl import follow
from khod.errors import Exit
from tests.lab.conftest import Boot
from tests.lab.host import IMAGES, INITRD
from tests.lab.remote import boot_remote
from tests.lab.sshd import Operator

OLD, NEW = "7.3.4", "7.2.12"
JUMP_SECONDS = 180


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_a_monitor_and_the_caller_go_through_a_real_jump(boot: Boot, tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    host = boot_remote(boot, OLD, (tmp_path / "login.pub").read_text())
    operator.configure(f"Host web\n  HostName 127.0.0.1\n  Port {host.port}\n  User root\n")
    (tmp_path / "known_hosts").write_text(host.known_host)
    before = operator.khoctl("--host", "web", "status", "--json").json
    assert before["kernel_release"] == f"{OLD}-kho"

    monitor = operator.start("--host", "web", "monitor", "--json", "--timeout", str(JUMP_SECONDS))
    assert monitor.stdout is not None
    assert json.loads(monitor.stdout.readline())["phase"] == "idle"
    files = ("--image", f"{IMAGES}/{NEW}/bzImage", "--initrd", INITRD)
    caller = operator.start("--host", "web", "kexec", *files, "--json", "--timeout", str(JUMP_SECONDS))
    called, said = caller.communicate(timeout=2 * JUMP_SECONDS)
    out, _err = monitor.communicate(timeout=2 * JUMP_SECONDS)
    assert (caller.returncode, monitor.returncode) == (Exit.done, Exit.done)
    for last in (called, out):
        found = json.loads(last.splitlines()[-1])
        assert (found["phase"], found["kernel_release"]) == ("verified", f"{NEW}-kho")
        assert found["boot_id"] != before["boot_id"]
    assert follow.IN_JUMP in out
    assert follow.OTHER_BOOT in out
    assert follow.OTHER_BOOT in said

    fleet = operator.khoctl("fleet", "status", "web")
    assert fleet.code == Exit.done
    assert f"{NEW}-kho" in fleet.out
