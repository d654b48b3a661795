# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rest of the host is stopped before the producers are frozen, and runs again whenever the handover ends here.

One guest serves the cases of a host that stays up: each must leave its units as it found them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import Online, usual
from tests.lab.host import Host, image

WORKER = "[Service]\nExecStart=/bin/sleep infinity\n"
RESTARTS = f"{WORKER}Restart=always\n"
HANGS = f"{WORKER}ExecStop=/bin/sleep 300\nTimeoutStopSec=15\n"
TICKER = "[Timer]\nOnActiveSec=1h\n"
TICKED = "[Service]\nType=oneshot\nExecStart=/bin/true\n"
ONCE = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
LISTENER = "[Socket]\nListenStream=/run/listener.sock\n"
UNITS = {
    "worker.service": WORKER,
    "restarts.service": RESTARTS,
    "ticker.timer": TICKER,
    "ticker.service": TICKED,
    "once.service": ONCE,
    "listener.socket": LISTENER,
    "listener.service": WORKER,
    "needed.service": WORKER,
}
RUNNING = ["worker.service", "restarts.service", "ticker.timer", "once.service", "listener.socket", "needed.service"]
REFUSES = """\
freeze = ["/bin/false"]
keep = ["needed.service"]
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host to the whole file, with units of all kinds that quiesce meets."""
    console = tmp_path_factory.mktemp("quiesce") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        found = Host(guest)
        install(found)
        yield found


def install(host: Host) -> None:
    """Put the units into the host and start them."""
    for name, text in UNITS.items():
        host.guest.put(f"/etc/systemd/system/{name}", text)
    host.shell(f"systemctl daemon-reload; systemctl start {' '.join(RUNNING)}")


def active(host: Host) -> dict[str, str]:
    """Give every active unit that could be stopped, with its invocation if it is a oneshot."""
    names = host.shell(
        "systemctl list-units --plain --no-legend --state=active --type=service,socket,timer,path | awk '{print $1}'"
    ).split()
    once = host.shell("systemctl show -p InvocationID --value once.service").strip()
    # A connection of the test's own agent, and what a bus call has started, come and go by themselves.
    return {name: once if name == "once.service" else "" for name in names}


@contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Hold that the same units are active afterwards."""
    before = active(host)
    yield
    assert active(host) == before
    assert host.status()["phase"] in ("idle", "verified")


@contextmanager
def producer(host: Host, text: str = REFUSES) -> Iterator[None]:
    """Give the host one producer, a file of producers.d."""
    host.guest.put("/etc/kho/producers.d/one.toml", text)
    yield
    host.shell("rm /etc/kho/producers.d/one.toml")


def plan(host: Host) -> str:
    """Give what `khoctl plan` says of the step."""
    found = json.loads(host.khoctl("plan", *image("7.3.4"), "--json").stdout)
    (step,) = [step for step in found["steps"] if step["step"] == "quiesce"]
    does: str = step["does"]
    return does


def test_plan_names_what_is_stopped_and_a_veto_at_freeze_starts_it_again(host: Host) -> None:
    with producer(host), unchanged(host):
        does = plan(host)
        for name in ("worker.service", "restarts.service", "ticker.timer", "listener.socket"):
            assert name in does
        for name in ("once.service", "needed.service", "dbus", "systemd-journald", "kho-handover"):
            assert name not in does, does
        began = host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value worker.service")
        kept = host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value needed.service")
        refused = host.khoctl("kexec", *image("7.3.4"), code=3).stderr
        assert "one" in refused
        assert host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value worker.service") != began
        assert host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value needed.service") == kept


def test_the_journal_of_an_orderly_jump_is_whole_and_its_file_systems_are_clean(online: Online) -> None:
    host = Host(online("7.3.4"))
    install(host)
    before = host.guest.boot_id
    host.kexec("7.3.4")
    assert host.guest.boot_id != before
    verified = host.shell("khoctl status --json")
    assert json.loads(verified)["phase"] == "verified"
    log = host.dmesg()
    assert "recovery complete" not in log, log
    assert "orphan cleanup" not in log, log
