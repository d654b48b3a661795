"""The mission's own document, on a real kernel: activate, look, abort, then the whole handover from idle."""

from tests.lab.conftest import Boot
from tests.lab.host import KHO, Host

KHOD = "/var/lib/khod"


def test_a_handover_from_idle_arrives_byte_for_byte(boot: Boot) -> None:
    host = Host(boot("7.3.4", cmdline_extra=KHO))
    assert host.guest.wait_online() == "running"
    host.with_module()
    host.guest.run(["systemctl", "start", "kho-handover"])

    host.khoctl("activate")
    assert host.word("/sys/kernel/kho/active") == "1"
    shown = host.khoctl("dt", "show").stdout
    assert 'compatible = "kho-v1"' in shown
    assert "global-trace" in shown

    host.khoctl("abort")
    host.untouched()

    first = host.guest.boot_id
    host.kexec("7.3.4")
    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified"
    assert status["verdict"] == {"arrived": ["ftrace"], "missing": [], "changed": [], "reason": ""}
    assert status["boot_id"] == host.guest.boot_id != first
    assert host.guest.get("/sys/firmware/kho/dt") == host.guest.get(f"{KHOD}/snapshots/{status['run']}/root")
    assert "pages intact" in host.dmesg()  # the module's own oracle for the memory behind the tree
    journal = host.shell("journalctl -b -u kho-handover -o json MESSAGE_ID=7f1c3c0f5e0a4f1e9a3f0b9c6d2e4a0c")
    assert '"KHO_PHASE":"verified"' in journal
    host.untouched()
