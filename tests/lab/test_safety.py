# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may go wrong around a handover on a real kernel, and must leave nobody frozen and lose nobody's memory.

One guest serves the cases of each interface: 7.3.4 (stateless, loads first) and v3 (the module, activates first).
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.host import MARKER, Host, image
from tests.lab.process import call
from tests.lab.store import check_arrived, fill, start_store

V3 = "v3"
MEBIBYTES = 4
KHOCTL_SECONDS = 60.0
"""Seconds khoctl takes by itself on a busy machine without KVM."""

only_stateless = pytest.mark.parametrize("host", ["7.3.4"], indirect=True)

POOL = "/run/pool"
STORAGE = f"""\
timeout = 10
freeze = ["fsfreeze", "--freeze", "{POOL}"]
thaw = ["fsfreeze", "--unfreeze", "{POOL}"]
"""
DATABASE = f"""\
timeout = 3
after = ["storage"]
thaw = ["sh", "-c", "echo open > {POOL}/db"]
"""

# The first thaw never ends, the next one does.
SLOW_THAW = "mkdir /run/thawing && exec sleep infinity\nrm /run/held\n"
SLOW = """\
after = ["ticker"]
freeze = ["touch", "/run/held"]
thaw = ["sh", "/run/slow-thaw"]
"""

# systemd stops it before khod, as it is ordered after it.
SLOW_TO_STOP = """\
[Unit]
After=kho-handover.service
[Service]
ExecStart=/bin/sleep infinity
ExecStop=/bin/sh -c 'until [ -e /run/may-stop ]; do sleep 0.1; done'
TimeoutStopSec=300
"""

DAMAGE = """\
[Service]
ExecStartPre=-+/bin/sh /lab/damage
"""
"""Outside khod's confinement (+), as whatever damages a record is."""

# In the middle of freezing until the shutdown is under way, and three seconds more, in which systemd stops what is
# ordered after khod.
GATE = """\
touch /run/freezing
until [ "$(systemctl is-system-running)" = stopping ]; do sleep 0.1; done
sleep 3
"""
GATE_HOOK = """\
timeout = 60
freeze = ["sh", "/lab/gate"]
restore = ["true"]
"""


NEWER = """sed -i 's/"version": 1/"version": 2/' handover.json"""


@pytest.fixture(scope="module", params=["7.3.4", V3])
def host(request: pytest.FixtureRequest, lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host with the key-value store on it to the cases of a kernel interface."""
    console = tmp_path_factory.mktemp("safety") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        made = Host(guest)
        if request.param == V3:
            made.with_module()
        start_store(made)
        yield made


@pytest.fixture(autouse=True)
def put_back(host: Host) -> Iterator[None]:
    """Hold after each case that nothing is loaded, nothing is active and nobody is frozen."""
    yield
    host.shell("rm -f /etc/kho/producers.d/*.toml")
    assert host.word("/sys/kernel/kexec_loaded") == "0"
    assert "1" not in host.shell("cat /sys/kernel/kho/active", check=False)
    fill(host, MEBIBYTES)


def hooks(host: Host, **files: str) -> None:
    for name, text in files.items():
        host.guest.put(f"/etc/kho/producers.d/{name}.toml", text)


def everything_held(host: Host) -> None:
    """Bring the host to where everyone is frozen and the image is loaded, in the order that the kernel wants."""
    host.khoctl("kexec", *image("7.3.4"), "--load-only")
    host.khoctl("activate")
    assert host.word("/sys/kernel/kexec_loaded") == "1"


@pytest.mark.proof("7.3.4")
def test_a_thaw_that_hangs_in_the_kernel_keeps_nobody_else_frozen(host: Host, tmp_path: Path) -> None:
    """`db` is thawed before `storage` and writes to what that one has frozen: it sleeps where no signal reaches it."""
    call(["mke2fs", "-q", "-t", "ext4", tmp_path / "pool", "2M"])
    host.guest.put(f"{POOL}.img.gz", gzip.compress((tmp_path / "pool").read_bytes()))
    host.shell(f"gunzip {POOL}.img.gz; mkdir {POOL}; mount -o loop {POOL}.img {POOL}")
    host.configure("safety", "[deadlines]\nrollback = 10\n")
    hooks(host, storage=STORAGE, db=DATABASE)
    everything_held(host)
    bound = json.loads(host.khoctl("plan", "--json").stdout)["rollback_seconds"]

    failed = host.guest.run(["khoctl", "abort"], check=False, timeout=bound + KHOCTL_SECONDS)

    assert failed.rc == 6, failed
    assert "db" in failed.stderr
    assert "Then: khoctl abort" in failed.stderr
    host.guest.run(["touch", f"{POOL}/thawed"], timeout=20)
    status = host.status(code=6)
    assert status["phase"] == "failed"
    assert status["left"] == ["prepare", "freeze"]
    assert [(item["producer"], item["step"]) for item in status["not_undone"]] == [("db", "freeze")]
    assert status["not_undone"][0]["remedy"]
    assert not status["kernel_loaded"]
    assert not status["kernel_active"]

    host.khoctl("abort")

    assert host.word(f"{POOL}/db") == "open"
    status = host.status()
    assert (status["phase"], status["not_undone"], status["left"]) == ("idle", [], [])
    host.shell(f"umount {POOL}; rm -r {POOL} {POOL}.img /etc/kho/khod.toml.d/safety.toml")


@pytest.mark.proof(V3)
def test_khod_killed_while_it_rolls_back_is_started_again_and_goes_on(host: Host) -> None:
    host.guest.put("/run/slow-thaw", SLOW_THAW)
    hooks(host, slow=SLOW, ticker='unit = "ticker.service"\n')
    host.shell("systemd-run -q --unit=ticker sleep infinity")
    everything_held(host)
    assert host.shell("systemctl show -P FreezerState ticker").strip() == "frozen"
    restarts = int(host.shell("systemctl show -P NRestarts kho-handover"))
    aborting = host.guest.start(["khoctl", "abort"])
    host.shell("timeout 60 sh -c 'until [ -d /run/thawing ]; do sleep 0.1; done'")

    host.shell("systemctl kill --kill-whom=main --signal=SIGKILL kho-handover")

    assert aborting.wait().rc == 5
    again = f'"$(systemctl show -P NRestarts kho-handover)" -gt {restarts}'
    host.shell(f"timeout 90 sh -c 'until [ {again} ] && systemctl -q is-active kho-handover; do sleep 0.2; done'")
    assert host.shell("systemctl show -P FreezerState ticker").strip() == "running"
    assert host.shell("ls /run/held", check=False) == ""
    status = host.status()
    assert (status["phase"], status["left"], status["not_undone"]) == ("idle", [], [])
    assert "khod stopped unexpectedly while it rolled back" in status["last_error"]
    host.shell("systemctl stop ticker; rm -r /run/thawing")


@only_stateless
def test_a_handover_waits_for_the_producers_of_before_khod_was_restarted(host: Host) -> None:
    """The store stands still meanwhile, so that it is not back before khod is asked for the handover."""
    waits = 'journalctl -b -u kho-handover | grep -q "waiting for producers"'
    host.shell(
        "systemctl kill --kill-whom=main --signal=SIGSTOP kv-store; systemctl restart kho-handover;"
        f"khoctl activate & activating=$!; timeout 60 sh -c 'until {waits}; do sleep 0.1; done';"
        "systemctl kill --kill-whom=main --signal=SIGCONT kv-store; wait $activating"
    )
    status = host.status()
    assert status["phase"] == "active"
    producers = [(found["name"], found["phase"], found["answer"]) for found in status["producers"]]
    assert producers == [("kv-store", "freeze", "ready")]
    host.khoctl("abort")


@pytest.mark.proof
@only_stateless
def test_an_abort_while_systemd_takes_the_host_down_is_refused(host: Host) -> None:
    host.guest.put("/run/systemd/system/slow.service", SLOW_TO_STOP)
    host.shell("systemctl daemon-reload; systemctl start slow")
    host.leave_stop_to_systemd()
    digest, before = fill(host, MEBIBYTES), host.guest.boot_id
    host.khoctl("kexec", *image("7.3.4"), "--append", MARKER)

    host.khoctl("abort", code=3)

    assert host.word("/sys/kernel/kexec_loaded") == "1"
    host.guest.start(["touch", "/run/may-stop"])
    assert host.guest.wait_reboot(before).how == "kexec"
    check_arrived(host, digest, MEBIBYTES)


@only_stateless
@pytest.mark.parametrize(
    ("damage", "words", "says"),
    [
        ("head -c 200 handover.json > cut; mv cut handover.json", (), "cannot be understood"),
        pytest.param(NEWER, ("--now",), "version 2", marks=pytest.mark.proof),
        pytest.param("rm handover.json", ("--now",), "no record is left", marks=pytest.mark.proof),
    ],
    ids=["cut", "newer", "removed"],
)
def test_a_record_that_cannot_be_read_after_the_jump_loses_nothing(
    host: Host, damage: str, words: tuple[str, ...], says: str
) -> None:
    digest, before = fill(host, MEBIBYTES), host.guest.boot_id
    # systemd knows of the drop-in in the next kernel only.
    host.guest.put("/etc/systemd/system/kho-handover.service.d/damage.conf", DAMAGE)
    host.guest.put("/lab/damage", f"set -e\nrm /lab/damage\ncd /var/lib/khod\n{damage}\ntouch /run/damaged\n")
    host.guest.start(["khoctl", "kexec", *image("7.3.4"), "--append", MARKER, *words])
    assert host.guest.wait_reboot(before).how == "kexec"

    check_arrived(host, digest, MEBIBYTES)

    host.shell("rm /run/damaged")
    status = host.status()
    assert "stands in for the record" in status["last_error"]
    assert says in status["last_error"]


@pytest.mark.proof(V3)
def test_a_reboot_by_somebody_else_in_the_middle_of_freezing(request: pytest.FixtureRequest, host: Host) -> None:
    """Seen with systemd 262: `systemctl reboot` is a kexec where an image is loaded, as it is by then on 7.3.4.

    systemd stops khod and kv-store, which is frozen, side by side. On v3 no image is loaded yet, so the host boots cold
    and says why.
    """
    host.guest.put("/lab/gate", GATE)
    hooks(host, gate=GATE_HOOK)
    digest, before = fill(host, MEBIBYTES), host.guest.boot_id
    host.shell("sync")
    host.guest.start(["khoctl", "kexec", *image("7.3.4"), "--append", MARKER])
    host.shell("timeout 60 sh -c 'until [ -e /run/freezing ]; do sleep 0.1; done'")

    host.guest.start(["systemctl", "reboot"])
    hello = host.guest.wait_reboot(before)

    if request.node.callspec.params["host"] == V3:
        assert hello.how == "reset"
        host.khoctl("verify", code=7)
        status = host.status(code=7)
        assert status["phase"] == "cold_boot"
        assert "a handover was at freezing" in status["last_error"]
    else:
        assert hello.how == "kexec"
        check_arrived(host, digest, MEBIBYTES)
        assert "gate" in host.status()["verdict"]["arrived"]
