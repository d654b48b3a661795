"""Mainline KHO, by `finalize` and stateless: state arrives, and the kernel's own oracles say so."""

import pytest

from tests.lab.conftest import Boot
from tests.lab.host import INSTANCE, KHO, TRACE, Host, image

LINE = "written-before-the-jump"


def write_line(host: Host) -> None:
    """Leave a line in the preserved trace instance, as the mission's example does."""
    host.shell(f"echo 1 > {INSTANCE}/tracing_on; echo {LINE} > {INSTANCE}/trace_marker")


def line_is_there(host: Host) -> bool:
    """Tell whether the line stands in the instance of this kernel."""
    return LINE in host.shell(f"cat {INSTANCE}/trace")


@pytest.mark.parametrize("version", ["6.18.15", "6.19.11", "7.3.4"])
def test_preserved_memory_arrives(boot: Boot, version: str) -> None:
    host = Host(boot(version, cmdline_extra=f"{KHO} {TRACE}"))
    host.guest.wait_online()
    write_line(host)

    host.kexec(version)

    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    assert {"memblock", "kho_test"} <= set(status["verdict"]["arrived"])
    log = host.dmesg()
    assert "Revived memory reservation 'trace' from KHO" in log
    assert "KHO restore succeeded" in log
    assert line_is_there(host)

    host.khoctl("activate")  # a second handover in a row: 7.3.4 may show no out/fdt in a kernel that was handed to
    assert host.status()["phase"] == "active"


def test_another_format_hands_over_nothing_and_khod_is_not_fooled(boot: Boot) -> None:
    """6.19.11 writes kho-v1, 7.3.4 reads kho-v4: the trace line may survive by luck, the state does not."""
    host = Host(boot("6.19.11", cmdline_extra=f"{KHO} {TRACE}"))
    host.guest.wait_online()
    write_line(host)
    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    assert "check formats" in refused.stderr
    assert "kho-v1" in refused.stderr
    assert "kho-v4" in refused.stderr
    host.guest.put("/etc/kho/khod.toml.d/formats.toml", '[checks]\nformats = "warn"\n')
    host.guest.run(["systemctl", "reload", "kho-handover"])

    host.kexec("7.3.4")

    status = host.status(code=7)
    assert status["phase"] == "degraded"
    assert status["verdict"]["arrived"] == []
    assert "memblock" in status["verdict"]["missing"]
    assert "is incompatible with" in host.dmesg()
    host.khoctl("verify", code=7)
    assert host.shell("systemctl show -P ActiveState kho-verify.service").strip() == "failed"


def test_after_an_abort_a_kernel_that_forgets_is_suspect(boot: Boot) -> None:
    """On 6.18.15 an abort destroys the kernel's list of preserved pages: the next handover is refused."""
    host = Host(boot("6.18.15", cmdline_extra=f"{KHO} {TRACE}"))
    host.guest.wait_online()
    host.khoctl("activate")
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "1"
    host.guest.run(["systemctl", "kill", "--signal=SIGKILL", "kho-handover"])
    host.khoctl("status")  # the socket starts khod again, which rolls back: it still knows this generation
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"

    refused = host.khoctl("activate", code=3)

    assert "forget" in refused.stderr
    assert "Reboot" in refused.stderr
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"
