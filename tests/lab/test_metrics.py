# SPDX-License-Identifier: LGPL-2.1-or-later
"""What monitoring and the journal get: promtool takes the metrics, systemd 262 the interface and the catalog."""

import json
import subprocess

import pytest

from khod.engine.journal_fields import Message
from khod.metrics.table import METRICS
from khod.metrics.text import render_text
from tests.lab.conftest import Online
from tests.lab.host import Host
from tests.unit.monitored import STATES

SOCKET = "/run/systemd/report/io.kho.Handover"
DIRECTORY = "/var/lib/metrics"
DROPIN = "/run/systemd/system/kho-handover.service.d/metrics.conf"


@pytest.mark.parametrize("name", STATES)
def test_promtool_takes_every_state(name: str) -> None:
    ended = subprocess.run(
        ["promtool", "check", "metrics"], input=render_text(STATES[name]), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def listed(host: Host, method: str) -> list[dict[str, object]]:
    """Call a method of io.systemd.Metrics as systemd does, as a user without rights."""
    call = f"varlinkctl --more --json=short call {SOCKET} io.systemd.Metrics.{method} {{}}"
    answer = host.guest.run(["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", call]).stdout
    return [json.loads(line) for line in answer.splitlines() if line]  # JSON-SEQ: a record separator ends a line, too


def until(host: Host, condition: str) -> None:
    """Wait in the guest until a command succeeds."""
    host.shell(f"timeout 60 sh -c 'until {condition}; do sleep 0.2; done'")


def complaints(host: Host) -> str:
    """What the journal has of metrics that were not written."""
    return host.shell(f"journalctl --no-pager -x MESSAGE_ID={Message.metrics_unwritten.identifier} || true")


def test_a_confined_khod_is_monitored(online: Online) -> None:
    host = Host(online("7.3.4"))
    host.guest.wait_online()
    assert host.word("/sys/module/apparmor/parameters/enabled") == "Y"

    families, values = listed(host, "Describe"), listed(host, "List")
    assert [family["name"] for family in families] == [f"io.kho.Handover.{metric.name}" for metric in METRICS]
    assert {"name": "io.kho.Handover.phase", "fields": {"phase": "idle"}, "value": 1} in values
    introspected = host.shell(f"varlinkctl introspect {SOCKET} io.systemd.Metrics")
    assert "method List()" in introspected
    systemd_s = listed_by_systemd(host)
    assert {"name", "value"} <= set(systemd_s) <= {"name", "object", "fields", "value"}, "as PID 1's own metrics"

    host.shell(f"journalctl --update-catalog; mkdir {DIRECTORY}")
    host.configure("metrics", f'[metrics]\ndirectory = "{DIRECTORY}"\n')
    host.shell("systemctl restart kho-handover")
    until(host, f"journalctl -q MESSAGE_ID={Message.metrics_unwritten.identifier} | grep -q .")
    said = complaints(host)
    assert "EROFS" in said, said
    assert "ReadWritePaths=DIRECTORY" in said, "the catalog's entry"
    assert host.shell(f"ls -A {DIRECTORY}") == ""

    host.guest.put(DROPIN, f"[Service]\nReadWritePaths={DIRECTORY}\n")
    host.shell("systemctl daemon-reload; systemctl restart kho-handover")
    until(host, f"[ -e {DIRECTORY}/kho.prom ]")
    assert host.shell(f"stat -c %a:%U {DIRECTORY}/kho.prom; ls -A {DIRECTORY}").split() == ["644:root", "kho.prom"]
    host.shell(f"rm {DIRECTORY}/kho.prom")
    host.khoctl("activate")
    assert host.shell(f"ls -A {DIRECTORY}") == ""
    host.khoctl("abort")
    until(host, f"[ -e {DIRECTORY}/kho.prom ]")
    assert 'kho_phase{phase="idle"} 1\n' in host.guest.get(f"{DIRECTORY}/kho.prom").decode()
    denied = host.shell("journalctl -k --no-pager | grep 'apparmor=\"DENIED\"' || true")
    assert "kho" not in denied, denied


def listed_by_systemd(host: Host) -> dict[str, object]:
    """Give one metric as PID 1 has it, on its own socket in the same directory."""
    path = "/run/systemd/report/io.systemd.Manager"
    answer = host.shell(f"varlinkctl --more --json=short call {path} io.systemd.Metrics.List {{}} | head -1")
    found: dict[str, object] = json.loads(answer.strip("\x1e\n"))
    return found


@pytest.mark.proof
def test_the_log_has_both_kernels_lines_in_one_order(online: Online) -> None:
    host = Host(online("7.3.4"))
    host.guest.wait_online()
    host.guest.put("/etc/systemd/journald.conf.d/zz.conf", "[Journal]\nStorage=persistent\n")
    host.shell(
        "systemctl unmask -q systemd-journal-flush.service; mkdir -p /var/log/journal;"
        "systemctl restart systemd-journald; journalctl --flush; sync"
    )
    host.kexec("7.3.4")
    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    until(host, f"khoctl history --json | grep -q {status['run']}")
    host.shell("journalctl --sync")

    release = host.shell("uname -r").strip()
    page = host.khoctl("logs")
    found = json.loads(host.khoctl("logs", status["run"][:8], "--json").stdout)

    assert page.stderr == ""
    assert [line for line in page.stdout.splitlines() if "--- jump" in line] == [
        f"--- jump: {release} -> {release} ---"
    ]
    assert (found["run"], found["missing"]) == (status["run"], [])
    lines = found["lines"]
    assert [line["boot"] for line in lines] == sorted(line["boot"] for line in lines)
    for boot in (1, 2):
        times = [line["monotonic"] for line in lines if line["boot"] == boot]
        assert times == sorted(times)
        assert {"khod", "kernel"} <= {line["source"] for line in lines if line["boot"] == boot}

    def place(boot: int, beginning: str) -> int:
        return next(at for at, line in enumerate(lines) if line["boot"] == boot and line["text"].startswith(beginning))

    assert place(1, "preparing:") < place(1, "executing:") < place(2, "Linux version 7.3.4") < place(2, "verified:")
    counted = {"name": "io.kho.Handover.handovers_total", "fields": {"outcome": "verified"}, "value": 1}
    assert counted in listed(host, "List")


@pytest.mark.proof
def test_a_journal_in_memory_is_named_by_the_log(online: Online) -> None:
    host = Host(online("7.3.4"))
    host.guest.wait_online()
    before = host.guest.boot_id
    host.kexec("7.3.4")
    host.khoctl("verify")
    until(host, f"khoctl history --json | grep -q {host.status()['run']}")
    page = host.khoctl("logs")
    assert page.stdout.startswith("--- jump: 7.3.4")
    assert f"before the jump ({before})" in page.stderr
    assert "Storage=persistent" in page.stderr
