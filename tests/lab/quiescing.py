# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host with units of all kinds that quiesce meets, and what must be the same once a handover was refused."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.host import Host, image

VERSION = "7.3.4"
WORKER = "[Service]\nExecStart=/bin/sleep infinity\n"
RESTARTS = f"{WORKER}Restart=always\n"
TICKER = "[Timer]\nOnActiveSec=1h\n"
ONE_SHOT = "[Service]\nType=oneshot\nExecStart=/bin/true\n"
ONCE = f"{ONE_SHOT}RemainAfterExit=yes\n"
LISTENER = "[Socket]\nListenStream=/run/listener.sock\n"
UNITS = {
    "worker.service": WORKER,
    "restarts.service": RESTARTS,
    "ticker.timer": TICKER,
    "ticker.service": ONE_SHOT,
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


def install(host: Host, units: Mapping[str, str] = UNITS) -> None:
    """Put these units into the host, and start RUNNING."""
    for name, text in units.items():
        host.guest.put(f"/usr/lib/systemd/system/{name}", text)
    host.shell(f"systemctl daemon-reload; systemctl start {' '.join(RUNNING)}")


@contextmanager
def start_host(disk: Path, console: Path) -> Iterator[Host]:
    """Give a host that has these units, on a copy of the disk."""
    with usual(lab_kernels.find(VERSION), disk, console) as guest:
        host = Host(guest)
        install(host)
        yield host


def list_active(host: Host) -> dict[str, str]:
    """Return every active unit that could be stopped, with its invocation if it is a oneshot."""
    names = host.shell(
        "systemctl list-units --plain --no-legend --state=active --type=service,socket,timer,path | awk '{print $1}'"
    ).split()
    once = host.shell("systemctl show -p InvocationID --value once.service").strip()
    passing = (
        "kho-sessions",
        "user-runtime-dir@",
    )  # one runs while khod asks it, the other while somebody is logged in
    return {name: once if name == "once.service" else "" for name in names if not name.startswith(passing)}


@contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Hold that the same units are active afterwards."""
    before = list_active(host)
    yield
    changed = list_active(host).items() ^ before.items()
    assert not changed, changed
    assert host.status()["phase"] in ("idle", "verified")


@contextmanager
def producer(host: Host, text: str = REFUSES) -> Iterator[None]:
    """Give the host one producer, a file of producers.d."""
    host.guest.put("/etc/kho/producers.d/one.toml", text)
    try:
        yield
    finally:
        host.shell("rm /etc/kho/producers.d/one.toml")


def write_to_disk(host: Host) -> None:
    """Hold that the root file system is not frozen."""
    host.shell("timeout 60 sh -c 'echo x > /var/lib/x; sync; rm /var/lib/x'; test ! -e /run/khod/frozen-filesystems")


def describe_quiesce(host: Host) -> str:
    """Return what `khoctl plan` says of the step."""
    found = json.loads(host.khoctl("plan", *image(VERSION), "--json").stdout)
    (step,) = [step for step in found["steps"] if step["step"] == "quiesce"]
    does: str = step["does"]
    return does
