# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mission's own document, on a real kernel: activate, look, abort, then the whole handover from idle."""

from pathlib import Path

from tests.lab import trees
from tests.lab.conftest import Online
from tests.lab.host import Host

KHOD = "/var/lib/khod"


def test_a_handover_from_idle_arrives_byte_for_byte(online: Online, tmp_path: Path) -> None:
    host = Host(online("7.3.4"))
    assert host.guest.wait_online() == "running"
    host.with_module()
    host.guest.run(["systemctl", "start", "kho-handover"])

    host.khoctl("activate")
    assert host.word("/sys/kernel/kho/active") == "1"
    shown = host.khoctl("dt", "show").stdout
    assert 'compatible = "kho-v1"' in shown
    assert "global-trace" in shown
    assert trees.held(host, "out", trees.v3(host, "out"), tmp_path) == {trees.ROOT}
    host.khoctl("dt", "validate")

    host.khoctl("abort")
    host.untouched()

    first = host.guest.boot_id
    host.kexec("7.3.4")
    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified"
    verdict = status["verdict"]
    assert verdict.pop("arrived") == ["ftrace"]
    assert {check["result"] for check in verdict.pop("checks")} == {"passed"}
    assert not any(verdict.values()), verdict
    assert status["boot_id"] == host.guest.boot_id != first
    assert host.guest.get("/sys/firmware/kho/dt") == host.guest.get(f"{KHOD}/snapshots/{status['run']}/root")
    assert trees.held(host, "in", trees.v3(host, "in"), tmp_path) == {trees.ROOT}
    assert trees.differing(host, "snapshot", "in", code=0) == set()
    assert host.khoctl("dt", "diff").stdout == ""
    assert status["run"] in host.khoctl("dt", "list").stdout
    host.khoctl("dt", "validate", "in")
    host.khoctl("dt", "validate", "snapshot")
    assert "pages intact" in host.dmesg()  # the module's own oracle for the memory behind the tree
    journal = host.shell("journalctl -b -u kho-handover -o json MESSAGE_ID=03053606e86346b3969bc1092e30937a")
    assert '"KHO_PHASE":"verified"' in journal
    host.untouched()
