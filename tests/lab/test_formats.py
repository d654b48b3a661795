"""Will the target understand? All nine ordered pairs of the lab's kernels, and the prediction held against the jump."""

import json

import pytest

from tests.lab.conftest import Online
from tests.lab.host import INSTANCE, Host, image
from tests.lab.kernels import VERSIONS

LINE = "written-before-the-jump"
NO_LUO = ("--remove", "liveupdate=on")
# The root's format, as the kernels' sources have it (KHO_FDT_COMPATIBLE).
ROOT = {"6.18.15": "kho-v1", "6.19.11": "kho-v1", "7.3.4": "kho-v4"}
# LUO's format, where a kernel has LUO and is booted with liveupdate=on (LUO_FDT_COMPATIBLE).
LUO = {"6.19.11": "luo-v1", "7.3.4": "luo-v5"}


def judged(host: Host, version: str) -> dict[str, str]:
    """Give what the check `formats` says to this kernel as the next one; the other checks may say anything."""
    result = host.guest.run(["khoctl", "check", *image(version), "--json"], check=False)
    assert result.rc in (0, 3), result.stderr
    (found,) = [check for check in json.loads(result.stdout) if check["name"] == "formats"]
    assert (result.rc == 3) >= (found["result"] == "fail")
    return dict(found)


def all_three(host: Host, running: str, *, luo: bool) -> None:
    """Hold the answer for each of the kernels as the next one against the formats that the sources have."""
    for version in VERSIONS:
        found = judged(host, version)
        evidence = found["evidence"]
        if ROOT[running] != ROOT[version]:
            assert found["result"] == "fail", found
            assert ROOT[running] in evidence
            assert ROOT[version] in evidence
        elif luo and LUO[running] != LUO.get(version):
            assert found["result"] == "fail", found
            assert LUO[running] in evidence
        else:
            assert found["result"] == "passed", found
            assert ROOT[running] in evidence


def write_line(host: Host) -> None:
    """Leave a line in the preserved trace instance, as the mission's example does."""
    host.shell(f"echo 1 > {INSTANCE}/tracing_on; echo {LINE} > {INSTANCE}/trace_marker")


@pytest.mark.parametrize("version", ["6.19.11", "7.3.4"])
def test_luo_has_a_format_of_its_own(online: Online, version: str) -> None:
    all_three(Host(online(version)), version, luo=True)


def test_predictions_hold_over_two_jumps(online: Online) -> None:
    """6.18.15 to 6.19.11: both write kho-v1, all arrives. From there to 7.3.4, which reads kho-v4: nothing does."""
    host = Host(online("6.18.15"))
    all_three(host, "6.18.15", luo=False)
    write_line(host)

    host.kexec("6.19.11", *NO_LUO)

    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    assert {"memblock", "kho_test"} <= set(status["verdict"]["arrived"])
    log = host.dmesg()
    assert "Revived memory reservation 'trace' from KHO" in log
    assert "KHO restore succeeded" in log
    assert LINE in host.shell(f"cat {INSTANCE}/trace")
    all_three(host, "6.19.11", luo=False)

    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    for words in ("check formats", "kho-v1", "kho-v4"):
        assert words in refused.stderr
    assert host.status()["phase"] == "verified"
    assert host.word("/sys/kernel/kexec_loaded") == "0"

    host.configure("formats", '[checks]\nformats = "warn"\n')
    assert judged(host, "7.3.4")["result"] == "warn"
    host.kexec("7.3.4")

    status = host.settled(code=7)
    assert status["phase"] == "degraded"
    assert status["verdict"]["arrived"] == []
    assert "memblock" in status["verdict"]["missing"]
    log = host.dmesg()
    assert "is incompatible with 'kho-v4'" in log
    assert "Revived memory reservation" not in log
    host.khoctl("verify", code=7)
    assert host.guest.wait_online() == "degraded"  # the unit asks the same, and may hear it a little later
    assert host.shell("systemctl show -P ActiveState kho-verify.service").strip() == "failed"
    host.shell("rm /etc/kho/khod.toml.d/formats.toml; systemctl reload kho-handover")
    all_three(host, "7.3.4", luo=False)


def test_losses_on_the_command_line_are_named(online: Online) -> None:
    host = Host(online("7.3.4"))
    kept = host.checks(*image("7.3.4"))["cmdline"]
    assert kept["result"] == "passed"

    words = ("reserve_mem", "trace_instance", "liveupdate")
    lost = host.checks(*image("7.3.4"), *(part for word in words for part in ("--remove", word)))["cmdline"]
    assert lost["result"] == "warn"
    for word in ("reserve_mem=12M:4096:trace", "trace_instance=boot_map@trace", "liveupdate=on"):
        assert word in lost["evidence"]

    moved = host.checks(*image("7.3.4"), "--remove", "reserve_mem", "--append", "reserve_mem=8M:4096:trace")["cmdline"]
    assert moved["result"] == "warn"
    assert "reserve_mem=12M:4096:trace" in moved["evidence"]

    bare = host.checks(*image("7.3.4"), "--cmdline", "console=ttyS0 root=/dev/vda rw panic=-1", code=3)["cmdline"]
    assert bare["result"] == "fail"
    for word in ("kho=on", "liveupdate=on", "reserve_mem=12M:4096:trace", "trace_instance=boot_map@trace"):
        assert word in bare["evidence"]
