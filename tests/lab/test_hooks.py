# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hooks as transient units of systemd 262, in a guest: every ending a command may have, and what is left of it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.host import Host
from tests.lab.process import call

KHOD = "/tmp/x"
# Runs commands as hooks, one after the other, each with a deadline, as the barrier does; prints what came of each.
DRIVER = """\
import asyncio, json, sys
from khod.producers import children
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.hooks import Hook
from khod.producers.transient import TransientUnits

async def tell(name, argv, deadline, prepared):
    # A part of the producer's time is for preparing: the deadline is that of the freeze alone.
    hook = Hook(name, 200.0 if prepared else float(deadline), commands={"freeze": argv}, runner=TransientUnits())
    telling = ProducerCall(Verb.freeze, "run-1", "")
    if prepared:
        await hook.carry_out(ProducerCall(Verb.prepare, "run-1", ""))
        assert len(hook._prepared) == 1, "its unit waits"
    try:
        async with asyncio.timeout(float(deadline)):
            await hook.carry_out(telling)
    except TimeoutError:
        return "no answer"
    except ParticipantVeto as veto:
        return str(veto)
    return "ready"

async def main(calls):
    for call in calls:
        with open("/run/answer", "w") as file:
            json.dump(await tell(*call), file)

asyncio.run(main(json.loads(sys.argv[1])))
"""


@dataclass
class Told:
    """What came of a hook, and what it wrote that khod passed on."""

    answer: str
    passed_on: str


@pytest.fixture(scope="module")
def host(plain_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one guest to the whole file, with khod's sources and a file system to freeze on /mnt."""
    place = tmp_path_factory.mktemp("hooks")
    call(["mke2fs", "-q", "-t", "ext4", place / "disk", "32M"])
    with usual(lab_kernels.find("7.3.4"), plain_disk, place / "console.log") as guest:
        guest.qmp("blockdev-add", driver="file", node_name="mnt0", filename=str(place / "disk"))
        guest.qmp("device_add", driver="virtio-blk-pci", id="mnt", drive="mnt0", bus="hot")
        here = Host(guest)
        here.shell("echo 1 > /sys/bus/pci/rescan; mount /dev/vdb /mnt")
        here.put_sources(KHOD)
        guest.put(f"{KHOD}/driver.py", DRIVER)
        yield here


def told(host: Host, *argv: str, name: str = "one", deadline: float = 30, prepared: bool = False) -> Told:
    """Tell one hook to freeze, its output to files: 1 GiB of it would be much for the line to the guest."""
    calls = json.dumps([[name, argv, deadline, prepared]])
    script = 'python3 "$0" "$1" > /run/out 2> /run/err'
    host.guest.run(["sh", "-c", script, f"{KHOD}/driver.py", calls], timeout=deadline + 90)
    return Told(json.loads(host.shell("cat /run/answer")), host.shell("tail -qc 20000 /run/out /run/err"))


def shell(host: Host, script: str, **options: float) -> Told:
    return told(host, "/bin/sh", "-c", script, **options)  # type: ignore[arg-type]


def nothing_is_left(host: Host) -> None:
    """No unit of a hook, once systemd has accounted for its end, and no process that one started."""
    gone = "! systemctl list-units --all --no-legend 'kho-hook-*' | grep -q ."
    host.shell(f'timeout 20 sh -c "until {gone}; do sleep 0.1; done" || true')
    assert (*host.hook_leftovers(), host.shell("pgrep -f '^sleep 4[0-9][0-9]' || true").strip()) == ("", "", "")


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
@pytest.mark.parametrize(
    ("script", "deadline", "answer"),
    [
        ("exit 0", 30, "ready"),
        ("echo one; echo 'not now' >&2; exit 3", 30, "not now"),
        ("exit 3", 30, "exit code 3"),
        ("kill -KILL $$", 30, "killed by SIGKILL"),
        ("kill -TERM $$", 30, "killed by SIGTERM"),
        ("printf '\\377\\001\\n' >&2; exit 1", 30, "\\xff"),
        ("sleep 400", 3, "no answer"),
        ("trap '' TERM INT HUP; sleep 401", 3, "no answer"),
        ("sleep 402 & exit 0", 30, "ready"),
        ("setsid env -i sleep 403 & exit 0", 30, "ready"),
        ("setsid env -i sh -c 'sleep 404 & sleep 405' & sleep 406", 3, "no answer"),
        ("systemctl is-system-running >/dev/null; ip link >/dev/null; ls /root >/dev/null", 30, "ready"),
    ],
)
def test_every_ending(host: Host, script: str, deadline: float, answer: str, prepared: bool) -> None:
    found = shell(host, script, deadline=deadline, prepared=prepared).answer
    assert answer in found or (answer == "\\xff" and found.isprintable() and found not in ("ready", "no answer")), found
    nothing_is_left(host)


def test_what_would_answer_after_its_deadline_is_ended_before(host: Host) -> None:
    host.shell("rm -f /run/answered")
    assert shell(host, "sleep 6; echo late > /run/answered; exit 0", deadline=2).answer == "no answer"
    nothing_is_left(host)
    host.shell("sleep 8; test ! -e /run/answered")


def test_what_it_writes_is_passed_on_with_its_name(host: Host) -> None:
    found = shell(host, 'echo "$KHO_NAME $KHO_VERB $KHO_RUN"; echo bad >&2')
    assert found.answer == "ready"
    assert "one: freeze: one freeze run-1" in found.passed_on
    assert "one: freeze: bad" in found.passed_on


@pytest.mark.parametrize("size", ["300M", pytest.param("1G", marks=pytest.mark.proof)])
def test_a_flood_is_cut_and_holds_nobody_up(host: Host, size: str) -> None:
    found = shell(host, f"head -c {size} /dev/zero | tr '\\\\0' x; echo >&2 done; exit 1", deadline=500)
    assert found.answer == "done"
    assert int(host.shell("stat -c %s /run/out")) < 2 << 20
    nothing_is_left(host)


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
@pytest.mark.parametrize(
    ("argv", "reason"),
    [(["/no/such/command"], "cannot be started: (No such file|not found)"), (["/etc"], "cannot be started: ")],
)
def test_a_command_that_cannot_be_started_says_so(host: Host, argv: list[str], reason: str, prepared: bool) -> None:
    assert re.search(reason, told(host, *argv, prepared=prepared).answer)
    nothing_is_left(host)


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
def test_what_outlived_a_khod_that_was_killed_is_ended_before_the_next_verb(host: Host, prepared: bool) -> None:
    calls = json.dumps([["one", ["/bin/sh", "-c", "sleep 410"], 60, prepared]])
    host.guest.run(
        ["sh", "-c", 'setsid python3 "$0" "$1" >/run/out 2>&1 & echo $! > /run/pid', f"{KHOD}/driver.py", calls]
    )
    host.shell("timeout 60 sh -c \"until pgrep -f '^sleep 410'; do sleep 0.1; done\"")
    host.shell("kill -KILL $(cat /run/pid)")
    assert host.shell("pgrep -f '^sleep 410'")
    assert shell(host, "pgrep -f '^sleep 410' >&2; exit 0").answer == "ready"
    assert "one: freeze: " not in host.shell("cat /run/err"), "nothing of the earlier one ran beside it"
    nothing_is_left(host)


def test_a_name_that_is_taken_by_somebody_else_is_a_veto(host: Host) -> None:
    host.guest.put("/run/systemd/system/kho-hook-one.service", "[Service]\nExecStart=/bin/sleep 420\n")
    host.shell("systemctl daemon-reload; systemctl start kho-hook-one")
    try:
        assert "taken" in shell(host, "exit 0").answer
        assert host.shell("systemctl is-active kho-hook-one").strip() == "active"
    finally:
        host.shell("systemctl stop kho-hook-one; rm /run/systemd/system/kho-hook-one.service; systemctl daemon-reload")


def test_without_a_message_bus_and_beside_a_systemd_that_starts_anew_hooks_run(host: Host) -> None:
    host.shell("systemctl stop dbus.socket dbus.service")
    try:
        assert shell(host, "exit 0").answer == "ready"
    finally:
        host.shell("systemctl start dbus.socket")
    assert shell(host, "systemctl daemon-reexec; echo late >&2; exit 4", deadline=60).answer in ("late", "exit code 4")
    nothing_is_left(host)


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
def test_what_does_not_die_is_named_and_the_next_verb_runs_all_the_same(host: Host, prepared: bool) -> None:
    host.shell("fsfreeze --freeze /mnt")
    try:
        found = shell(host, "touch /mnt/x", deadline=8, prepared=prepared)
        assert found.answer == "no answer"
        assert "it sleeps in the kernel and does not die" in found.passed_on
        assert shell(host, "exit 0").answer == "ready"
    finally:
        host.shell("fsfreeze --unfreeze /mnt")
    nothing_is_left(host)
