# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit producer with the systemd it is written for (262, Debian forky), in a guest: what it says, what it does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import Online, usual
from tests.lab.host import IMAGES, INITRD, Host
from tests.lab.process import call

KHOD = "/tmp/x"
# Tells a unit verbs one after the other, each with a deadline, as the barrier does; prints what came of each.
DRIVER = """\
import asyncio, json, sys
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.unit import Unit

async def main(unit, how, deadline, note, *verbs):
    for verb in verbs:
        telling, answer = ProducerCall(Verb(verb), "run-1", note), "ready"
        try:
            async with asyncio.timeout(float(deadline)):
                await Unit("a", unit=unit, how=how).carry_out(telling)
        except TimeoutError:
            answer = "no answer"
        except ParticipantVeto as veto:
            answer = str(veto)
        note = telling.note
        print(json.dumps([answer, note]))

asyncio.run(main(*sys.argv[1:]))
"""
RESTING = "ExecStart=/bin/sleep infinity\n"
# Loops in one process each: in a shell's every turn forks, which keeps an emulated machine busy.
COUNT = """\
import itertools, os, time
for n in itertools.count():
    with open("/run/n", "w") as file:
        print(n, file=file)
    os.rename("/run/n", "/run/count")
    time.sleep(0.05)
"""
WRITE = """\
import time
while True:
    with open("/mnt/x", "w") as file:
        print("x", file=file)
    time.sleep(0.05)
"""
UNITS = {
    "count.service": f"ExecStart=/usr/bin/python3 {KHOD}/count.py\n",
    "rest.service": RESTING,
    "idle.service": RESTING,
    "mortal.service": RESTING,
    "slow.service": RESTING
    + "ExecStop=/bin/sh -c 'until [ -e /run/may-stop ]; do sleep 0.05; done'\nTimeoutStopSec=600\n",
    "writer.service": f"ExecStart=/usr/bin/python3 {KHOD}/write.py\n",
    "needed.service": RESTING,
    "needs.service": RESTING,
}
MOVES = "timeout {seconds} sh -c 'read from < /run/count; while read now < /run/count; [ $now -le $from ]; do :; done'"


@pytest.fixture(scope="module")
def host(plain_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one guest to the whole file, with khod's sources, some services, and a file system to freeze on /mnt."""
    place = tmp_path_factory.mktemp("unit")
    call(["mke2fs", "-q", "-t", "ext4", place / "disk", "32M"])
    with usual(lab_kernels.find("7.3.4"), plain_disk, place / "console.log") as guest:
        guest.qmp("blockdev-add", driver="file", node_name="mnt0", filename=str(place / "disk"))
        guest.qmp("device_add", driver="virtio-blk-pci", id="mnt", drive="mnt0", bus="hot")
        here = Host(guest)
        install(here)
        here.shell(
            "echo 1 > /sys/bus/pci/rescan; mount /dev/vdb /mnt;"
            "systemctl start count rest mortal slow writer needed needs"
        )
        yield here


def install(host: Host, where: str = "/run/systemd/system") -> None:
    """Put khod's sources, the driver and the units into the guest."""
    host.put_sources(KHOD)
    for name, text in {"driver": DRIVER, "count": COUNT, "write": WRITE}.items():
        host.guest.put(f"{KHOD}/{name}.py", text)
    for name, text in UNITS.items():
        requires = "[Unit]\nRequires=needed.service\n" if name == "needs.service" else ""
        host.guest.put(f"{where}/{name}", f"{requires}[Service]\n{text}")
    host.shell("systemctl daemon-reload")


def told(
    host: Host, unit: str, *verbs: str, how: str = "freeze", note: str = "", deadline: float = 30
) -> list[list[str]]:
    """Tell a unit these verbs; of each, what it answered and the note it left."""
    result = host.guest.run(["python3", f"{KHOD}/driver.py", unit, how, str(deadline), note, *verbs])
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(host: Host, unit: str, *verbs: str, **options: Any) -> str:
    """Tell a unit these verbs, the last of which it refuses: the reason, one line."""
    *before, (answer, _) = told(host, unit, *verbs, **options)
    assert [word for word, _ in before] == ["ready"] * len(before)
    assert answer not in ("ready", "no answer")
    assert answer.isprintable()
    return answer


def shown(host: Host, unit: str, key: str) -> str:
    return host.shell(f"systemctl show -P {key} {unit}").strip()


def counts(host: Host, seconds: int) -> bool:
    """Whether count.service counts on within so many seconds."""
    return host.guest.run(["sh", "-c", MOVES.format(seconds=seconds)], check=False).rc == 0


def test_a_service_stands_still_between_freeze_and_thaw(host: Host) -> None:
    assert counts(host, 20)
    note = "running freeze count.service /system.slice/count.service"
    assert told(host, "count.service", "prepare", "freeze") == [["ready", note]] * 2
    assert "frozen 1" in host.word("/sys/fs/cgroup/system.slice/count.service/cgroup.events")
    assert not counts(host, 2)
    assert told(host, "count.service", "thaw", "cancel", note="running") == [["ready", "running"]] * 2
    assert counts(host, 20)
    assert shown(host, "count.service", "NRestarts") == "0"


def test_a_service_is_stopped_and_started(host: Host) -> None:
    before = shown(host, "rest.service", "MainPID")
    note = "running stop rest.service /system.slice/rest.service"
    assert told(host, "rest.service", "prepare", "freeze", how="stop") == [["ready", note]] * 2
    assert shown(host, "rest.service", "ActiveState") == "inactive"
    assert told(host, "rest.service", "thaw", "thaw", how="stop", note="running") == [["ready", "running"]] * 2
    assert shown(host, "rest.service", "ActiveState") == "active"
    assert shown(host, "rest.service", "MainPID") != before


@pytest.mark.proof
def test_a_busy_systemd_answers_everybody(host: Host) -> None:
    """It takes up each call of a connection, however late it comes to it."""
    busy = "end=$(($(date +%s) + 20)); while [ $(date +%s) -lt $end ]; do systemctl daemon-reload; done"
    host.shell(f"systemd-run --unit=busy sh -c '{busy}'")
    assert told(host, "idle.service", *(["prepare"] * 150)) == [["ready", "inactive"]] * 150


@pytest.mark.parametrize("how", ["freeze", "stop"])
def test_what_is_at_rest_is_left_as_it_is(host: Host, how: str) -> None:
    verbs = ("prepare", "freeze", "thaw")
    assert told(host, "idle.service", *verbs, how=how) == [["ready", "inactive"]] * 3
    assert shown(host, "idle.service", "ActiveState") == "inactive"
    host.shell("systemctl freeze rest")
    assert told(host, "rest.service", *verbs, how=how) == [["ready", "frozen"]] * 3
    assert shown(host, "rest.service", "FreezerState") == "frozen"
    host.shell("systemctl thaw rest")


@pytest.mark.proof
def test_a_freeze_that_misses_its_deadline_is_thawed(host: Host) -> None:
    # A process that writes to a frozen file system sleeps where no freezer and no signal reaches it.
    host.shell("fsfreeze -f /mnt")
    try:
        pid = shown(host, "writer.service", "MainPID")
        stuck = f"timeout 20 sh -c 'until grep -q \"^State:.D\" /proc/{pid}/status; do :; done'"
        host.shell(stuck)
        freeze, thaw = told(host, "writer.service", "freeze", "thaw", note="running", deadline=5)
        assert freeze[0] == "no answer"
        assert thaw[0] == "ready"
        assert shown(host, "writer.service", "FreezerState") == "running"
        assert told(host, "writer.service", "freeze", note="running", deadline=5)[0][0] == "no answer"
        assert shown(host, "writer.service", "FreezerState") == "freezing"
        assert "freezing" in refused(host, "writer.service", "prepare")
    finally:
        host.shell("fsfreeze -u /mnt")
    assert told(host, "writer.service", "thaw", note="running") == [["ready", "running"]]
    assert "frozen 0" in host.word("/sys/fs/cgroup/system.slice/writer.service/cgroup.events")


@pytest.mark.proof
def test_a_stop_that_misses_its_deadline_is_taken_back(host: Host) -> None:
    freeze, thaw = told(host, "slow.service", "freeze", "thaw", how="stop", note="running", deadline=5)
    assert (freeze[0], thaw[0]) == ("no answer", "no answer")  # the start waits until the stop has ended
    assert host.shell("systemctl list-jobs --no-legend").split()[1:3] == ["slow.service", "start"]
    host.shell("touch /run/may-stop")
    assert told(host, "slow.service", "thaw", how="stop", note="running") == [["ready", "running"]]
    assert shown(host, "slow.service", "ActiveState") == "active"


@pytest.mark.parametrize(
    ("unit", "how", "reason"),
    [
        ("nowhere.service", "freeze", "not-found"),
        ("multi-user.target", "freeze", "cannot be frozen"),
        ("dev-vda.device", "stop", "cannot be stopped"),
        ("short.scope", "stop", "transient"),
        ("khod-lab-agent.service", "freeze", "holds khod"),
        ("nosuffix", "freeze", "is not valid"),
        ("a@.service", "freeze", "missing the instance name"),
        ("dbus-org.freedesktop.login1.service", "freeze", "stands still"),
    ],
)
def test_prepare_refuses(host: Host, unit: str, how: str, reason: str) -> None:
    if unit == "short.scope":
        host.shell("systemd-run --quiet --scope --unit=short sleep infinity >/dev/null 2>&1 &")
        host.shell("timeout 20 sh -c 'until systemctl -q is-active short.scope; do :; done'")
    assert reason in refused(host, unit, "prepare", how=how)


def test_a_unit_that_would_stop_too_is_a_veto(host: Host) -> None:
    assert "needs.service depends on needed.service" in refused(host, "needed.service", "prepare", "freeze", how="stop")
    assert shown(host, "needed.service", "ActiveState") == "active"
    host.shell("systemctl stop needs")
    assert told(host, "needed.service", "freeze", "thaw", how="stop", note="running") == [["ready", "running"]] * 2


def test_a_unit_on_its_way_down_is_a_veto(host: Host) -> None:
    host.shell("rm -f /run/may-stop; systemctl stop --no-block slow")
    assert "deactivating" in refused(host, "slow.service", "prepare")
    host.shell("touch /run/may-stop; timeout 60 systemctl start slow")


def test_systemd_stops_no_frozen_unit(host: Host) -> None:
    assert told(host, "count.service", "prepare", "freeze")[1][0] == "ready"
    stop = host.guest.run(["systemctl", "stop", "count"], check=False)
    assert "Cannot perform operation on frozen unit count.service" in stop.stderr
    assert told(host, "count.service", "thaw", note="running")[0][0] == "ready"


def test_a_unit_that_dies_frozen_is_not_put_back(host: Host) -> None:
    assert told(host, "mortal.service", "prepare", "freeze")[1][0] == "ready"
    host.shell("systemctl kill -s KILL mortal; timeout 20 sh -c 'until systemctl -q is-failed mortal; do :; done'")
    assert "died while it was frozen" in refused(host, "mortal.service", "thaw", note="running")
    host.shell("systemctl reset-failed mortal; systemctl start mortal")  # nothing refers to it: systemd forgets


@pytest.mark.proof
def test_systemd_starts_anew_while_a_unit_is_frozen(host: Host) -> None:
    assert told(host, "count.service", "prepare", "freeze")[1][0] == "ready"
    host.shell("systemctl daemon-reexec")
    assert shown(host, "count.service", "FreezerState") == "frozen"
    assert told(host, "count.service", "thaw", note="running")[0][0] == "ready"
    assert counts(host, 20)


@pytest.mark.proof
def test_a_kexec_goes_past_a_frozen_unit_and_the_next_kernel_starts_it(online: Online, plain_disk: Path) -> None:
    host = Host(online("7.3.4", disk=plain_disk))
    host.guest.wait_online()
    install(host, "/etc/systemd/system")
    host.shell(
        "mkdir -p /etc/systemd/system/multi-user.target.wants; cd /etc/systemd/system/multi-user.target.wants;"
        "ln -s ../rest.service; systemctl daemon-reload; systemctl start rest"
    )
    assert told(host, "rest.service", "prepare", "freeze")[1][0] == "ready"
    host.shell(f"kexec -s -l {IMAGES}/7.3.4/bzImage --initrd={INITRD} --reuse-cmdline")
    assert host.guest.kexec().how == "kexec"
    host.guest.wait_online()
    assert shown(host, "rest.service", "ActiveState") == "active"
    assert shown(host, "rest.service", "FreezerState") == "running"
    install(host, "/etc/systemd/system")
    assert told(host, "rest.service", "restore", "finish", note="running") == [["ready", "running"]] * 2
