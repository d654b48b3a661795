# SPDX-License-Identifier: LGPL-2.1-or-later
"""The timeline against a witness outside of the guest, which hears a producer's heartbeat on the serial line.

The log of the run is fetched from the guest, and the timeline computed from it here, as khod does at the end of a run.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from khod.history.log import read_log
from khod.history.model import ClockSource, Departure, RunLog, Timeline, TimelineRow
from khod.history.timeline import build_timeline
from tests.lab.conftest import Online
from tests.lab.host import MARKER, Host, image
from tests.lab.witness import Witness

VERSION = "7.3.4"
QUICK = {("orderly", True, 0)}
RUNS = [
    pytest.param(*one, marks=[] if one in QUICK else pytest.mark.proof)
    for one in itertools.product(("systemctl", "orderly", "now"), (False, True), range(10))
]
"""How the host jumps, whether its clock is set back an hour, and a number; one of them is in `make test`."""
WITNESS_SECONDS = 0.05
"""How exact the witness is: a beat's line goes through two systems that share a machine."""
SHARE = 0.01
COVERED = 0.95
SLOW = "[Service]\nExecStart=/usr/bin/sleep infinity\nExecStop=/usr/bin/sleep 20\n"
SET_BACK = f"""\
[Unit]
DefaultDependencies=no
Before=sysinit.target
ConditionKernelCommandLine={MARKER}

[Service]
Type=oneshot
ExecStart=/usr/bin/date --set="1 hour ago"

[Install]
WantedBy=sysinit.target
"""
PERSISTENT = "[Journal]\nStorage=persistent\n"


def with_heart(host: Host, *, set_back: bool) -> Host:
    """Start the producer, keep the journal on the disk, and have the next kernel's clock set back an hour if asked."""
    host.install_producer("heart", "/dev/ttyS0", "finish")
    host.guest.put("/etc/systemd/journald.conf.d/zz.conf", PERSISTENT)
    if set_back:
        host.guest.put("/etc/systemd/system/set-back.service", SET_BACK)
        host.shell("systemctl daemon-reload; systemctl enable -q set-back")
    host.shell(
        "mkdir -p /var/log/journal; rm -f /etc/systemd/system/systemd-journal-flush.service; systemctl daemon-reload;"
        "systemctl restart systemd-journald; journalctl --flush; systemctl start heart; sync"
    )
    return host


def fetch_log(host: Host, folder: Path) -> RunLog:
    """Give the log of the run, once khod has added how it ended."""
    run = host.status()["run"]
    path = f"/var/lib/khod/runs/{run}.jsonl"
    host.shell(f"timeout 120 sh -c 'until grep -q \"^{{.departure\" {path}; do sleep 0.2; done'")
    (folder / f"{run}.jsonl").write_bytes(host.guest.get(path))
    return read_log(folder / f"{run}.jsonl")


def union_seconds(departure: Departure) -> float:
    """Give how much of the shutdown lies inside some unit's stop."""
    assert departure.start_monotonic is not None
    assert departure.finish_monotonic is not None
    covered, reached = 0.0, departure.start_monotonic
    for stop in sorted(departure.stops, key=lambda one: one.began_monotonic):
        end = min(stop.ended_monotonic, departure.finish_monotonic)
        covered += max(0.0, end - max(stop.began_monotonic, reached))
        reached = max(reached, end)
    return covered


def find_row(timeline: Timeline, parent: str, name: str) -> TimelineRow:
    """Give a row by the step that it is a part of, and its name."""
    (found,) = [row for row in timeline.rows if (row.parent, row.name) == (parent, name)]
    return found


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def describe(timeline: Timeline) -> Iterable[str]:
    return (f"{row.begin:9.3f} {row.seconds:9.3f} {row.parent:>16} {row.name}" for row in timeline.rows)


@pytest.mark.parametrize(("how", "set_back", "number"), RUNS)
def test_the_parts_add_up_to_the_blackout_that_a_witness_sees(
    online: Online, how: str, set_back: bool, number: int, tmp_path: Path
) -> None:
    host = with_heart(Host(online(VERSION)), set_back=set_back)
    if how == "systemctl":
        host.leave_stop_to_systemd()
    witness = Witness(host.guest.machine)
    witness.begin()

    now = ["--now"] if how == "now" else []
    assert host.guest.kexec(argv=("khoctl", "kexec", *image(VERSION), "--append", MARKER, *now)).how == "kexec"

    silence = witness.silence().end
    host.khoctl("verify")
    log = fetch_log(host, tmp_path)
    timeline = build_timeline(log)
    shown = "\n".join(describe(timeline))
    print(f"{how} {number}: witness {silence:.3f} s, {timeline.blackout_seconds} ± {timeline.error_seconds} s\n{shown}")
    print("\n".join(timeline.unknown))
    assert timeline.source is ClockSource.tsc, timeline.unknown
    assert timeline.blackout_seconds is not None
    parts = sum(row.seconds for row in timeline.rows if not row.parent and row.begin >= 0)
    assert abs(parts - timeline.blackout_seconds) < 1e-4
    last, first = (find_row(timeline, step, "heart") for step in ("freeze", "finish"))
    shortest, longest = first.begin - (last.begin + last.seconds), first.begin + first.seconds - last.begin
    exact = timeline.error_seconds + WITNESS_SECONDS
    assert shortest - exact <= silence <= longest + exact, shown
    assert abs(timeline.blackout_seconds - silence) <= max(SHARE * silence, longest - shortest + exact), shown
    assert any("The wall clock was set" in sentence for sentence in timeline.unknown) is set_back
    assert lines(timeline.analyze) == lines(host.shell("systemd-analyze time"))
    assert ("(stopping)" in timeline.analyze) is (how == "systemctl")


@pytest.mark.proof
def test_the_shutdown_is_explained_by_its_units(online: Online, tmp_path: Path) -> None:
    """One service takes as long to stop as a database may.

    Without it 64 % of the second that the shutdown of this guest takes were inside a stop: under emulation PID 1 needs
    20 to 50 ms for each target, of which it says only when it has stopped, and 65 ms from the last stop to its own end.
    """
    host = with_heart(Host(online(VERSION)), set_back=False)
    host.guest.put("/etc/systemd/system/slow.service", SLOW)
    host.shell("systemctl daemon-reload; systemctl start slow")
    host.leave_stop_to_systemd()
    host.kexec(VERSION)
    host.khoctl("verify")
    departure = fetch_log(host, tmp_path).departure
    assert departure is not None
    assert departure.start_monotonic is not None
    assert departure.finish_monotonic is not None
    shutdown = departure.finish_monotonic - departure.start_monotonic
    assert union_seconds(departure) >= COVERED * shutdown, departure


@pytest.mark.proof
def test_a_volatile_journal_is_said_to_know_nothing(online: Online, tmp_path: Path) -> None:
    """The lab's usual guest keeps its journal in /run."""
    host = Host(online(VERSION))
    host.leave_stop_to_systemd()
    host.kexec(VERSION)
    host.khoctl("verify")
    log = fetch_log(host, tmp_path)
    assert log.departure is not None
    assert log.departure.stops == []
    assert any("the journal has nothing of the boot before" in sentence for sentence in log.departure.unknown)
    assert build_timeline(log).blackout_seconds is not None
