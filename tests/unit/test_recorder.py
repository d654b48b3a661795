# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is remembered of each handover, by engines on the simulated kernel."""

import asyncio
import hashlib
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from khod.engine.recorder import Sources
from khod.errors import Failed, KhoError, Refused
from khod.history.log import LogWriter, append_entries, encode_entry, log_path, read_log
from khod.history.model import Arrival, KernelFacts, RunEnd
from khod.model import EventKind, Phase
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host


async def jumped(host: Host) -> str:
    """Hand over to the next kernel and start its khod; the run."""
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    run = host.record.run
    await host.started()
    return run


async def test_a_handover_is_remembered_with_its_events_of_both_kernels(host: Host) -> None:
    host.hook("a")
    before = host.kernel.read_file("/proc/sys/kernel/random/boot_id").decode().strip()
    run = await jumped(host)
    attempt = await host.remembered()
    assert (attempt.summary.run, attempt.summary.outcome) == (run, Phase.verified)
    assert attempt.summary.first_boot_id == before != attempt.summary.last_boot_id
    steps = [event.step for event in attempt.events if event.kind is EventKind.step_ended]
    assert steps == ["prepare", "freeze", "activate", "load"]
    boots = [event.boot_id for event in attempt.events]
    assert boots == sorted(boots, key=[before, attempt.summary.last_boot_id].index)
    assert {event.phase for event in attempt.events if event.boot_id != before} == {Phase.verifying, Phase.verified}
    assert attempt.target is not None
    assert [(image.role, image.digest) for image in attempt.target.images] == [
        (role, hashlib.sha256((host.directory / name).read_bytes()).hexdigest())
        for role, name in (("kernel", "vmlinuz"), ("initrd", "initrd"))
    ]
    assert "kho" in {check.name for check in attempt.checks}
    assert attempt.damage == ""


async def test_a_run_that_begins_while_facts_are_gathered_has_a_log_of_its_own(host: Host) -> None:
    asked, told = asyncio.Event(), asyncio.Event()

    async def read_arrival(kernel: KernelFacts) -> Arrival:
        asked.set()
        await told.wait()
        return Arrival(kernel, analyze="in the end")

    host.sources = replace(host.sources, read_arrival=read_arrival)
    host.hook("a")
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    engine = await host.started()
    await asked.wait()
    assert (await host.remembered()).summary.outcome is Phase.verified, (
        "at once: khod may be killed before more is known"
    )
    await engine.activate()
    told.set()
    known = await host.remembered(2)
    assert (known.summary.run, known.timeline.analyze) == (engine.record.arrived_run, "in the end")
    await engine.abort()
    rolled_back = await host.remembered(3)
    steps = [event.step for event in rolled_back.events if event.kind is EventKind.step_ended]
    assert (rolled_back.summary.run, steps) == (engine.record.run, ["prepare", "freeze", "activate"])
    assert rolled_back.events[-1].phase is Phase.idle, "verified is the outcome of the run before"
    assert rolled_back.damage == ""


async def test_a_veto_is_remembered_as_rolled_back(host: Host) -> None:
    host.hook("a", {"freeze": "echo busy >&2; exit 1"})
    engine = await host.started()
    with pytest.raises(Refused):
        await host.kexec(engine)
    attempt = await host.remembered()
    assert attempt.summary.outcome is Phase.idle
    assert "busy" in attempt.summary.reason
    assert attempt.summary.blackout_seconds is None
    assert len(host.attempts) == 1


async def test_a_refusal_before_the_first_step_is_remembered_once(host: Host) -> None:
    (host.directory / "vmlinuz").write_bytes(b"not an image")
    engine = await host.started()
    with pytest.raises(KhoError) as refused:
        await host.kexec(engine)
    attempt = await host.remembered()
    assert (attempt.summary.reason, attempt.summary.refused) == (str(refused.value), True)
    assert {check.name for check in attempt.checks} >= {"kho", "image"}
    (host.directory / "vmlinuz").unlink()
    await engine.activate()
    await engine.abort()
    later = await host.remembered(2)
    assert later.summary.run != attempt.summary.run
    assert later.summary.reason != attempt.summary.reason


async def test_a_test_of_a_producer_is_no_handover(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.rehearse_producer("a")
    await engine.activate()
    await engine.abort()
    attempt = await host.remembered()
    assert len(host.attempts) == 1
    assert attempt.summary.run == host.record.run


async def test_a_khod_that_rolls_back_an_earlier_one_s_run_remembers_it(host: Host) -> None:
    host.hook("a")
    first = await host.started()
    await first.activate()
    run = host.record.run
    with pytest.raises(Failed):
        await host.started()
    attempt = await host.remembered()
    assert (attempt.summary.run, attempt.summary.outcome) == (run, Phase.idle)
    assert [event.step for event in attempt.events if event.kind is EventKind.step_ended][:1] == ["prepare"]


async def test_a_cold_boot_is_remembered_once(host: Host) -> None:
    host.hook("a")
    host.kernel.set_fault("cold", True)
    await jumped(host)
    await host.started()
    attempt = await host.remembered()
    assert attempt.summary.outcome is Phase.cold_boot
    assert [event.step for event in attempt.events if event.kind is EventKind.step_began][-1] == "load"
    # The same run may be remembered again by now, with the explanation: it is one attempt all the same.
    assert {one.summary.run for one in host.attempts} == {attempt.summary.run}


async def test_what_a_khod_came_not_to_remember_the_next_one_does(host: Host) -> None:
    """It was killed after the record said how the handovers ended, or the disk was full."""
    unknown: list[str] = []

    async def knows(run: str) -> bool:
        return run not in unknown

    host.hook("a")
    host.sources = Sources(knows=knows)
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    rolled_back = (await host.remembered()).summary
    arrived = await jumped(host)
    await host.remembered(2)
    for run in (rolled_back.run, arrived):
        path = log_path(host.directory / "state", run)
        path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b'{"end"' not in line))
        unknown.append(run)
    host.attempts.clear()

    await host.started()
    await host.remembered(2)

    found = {attempt.summary.run: attempt for attempt in host.attempts}
    assert found[arrived].summary.outcome is Phase.verified
    assert found[arrived].damage == ""
    assert found[rolled_back.run].damage == "missing in the log of the run: how it ended"


async def test_an_attempt_whose_log_cannot_be_written_is_remembered_all_the_same(host: Host) -> None:
    """What an earlier kernel's khod saw of it is lost with the jump, and that is said."""
    (host.directory / "state/runs").write_text("in the way")
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    rolled_back = await host.remembered()
    assert (rolled_back.summary.outcome, rolled_back.damage) == (Phase.idle, "")
    assert [event.step for event in rolled_back.events if event.kind is EventKind.step_ended][:2] == [
        "prepare",
        "freeze",
    ]

    run = await jumped(host)

    assert host.record.outcome is Phase.verified
    arrived = await host.remembered(2)
    assert (arrived.summary.run, arrived.summary.outcome) == (run, Phase.verified)
    assert arrived.damage == "missing in the log of the run: how the run began"


def test_entries_that_a_full_disk_does_not_take_are_written_with_the_next_ones(tmp_path: Path) -> None:
    writer, first, end = LogWriter(tmp_path), RunEnd(Phase.idle, 1.0), RunEnd(Phase.verified, 2.0)
    path = log_path(tmp_path, "ab")
    append_entries(path, [first])
    before = path.read_bytes()
    at_most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, at_most[1]))  # the write ends after ten bytes
    try:
        writer.append("ab", [end])
        assert path.read_bytes() == before
        assert writer.finish("ab", [end]) == [end, end]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, at_most)
    writer.append("ab", [first])
    assert path.read_bytes() == before * 2


def test_a_line_cut_short_loses_itself_alone(host: Host) -> None:
    path, end = log_path(host.directory / "state", "abc"), RunEnd(Phase.verified, 1.0)
    path.parent.mkdir()
    line = encode_entry(end)
    path.write_bytes(line[: len(line) // 2])
    append_entries(path, [end])
    log = read_log(path)
    assert (log.end, log.damaged_lines) == (end, 1)
    path.write_bytes(b'{"later_kind": {}}\n' + line.replace(b'"reason"', b'"unknown_field"') + b"[]\n\xff\n")
    log = read_log(path)
    assert (log.end, log.damaged_lines) == (end, 2)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1e19", "9223372036854775808", "-" + "9" * 400])
def test_a_line_with_a_number_that_no_clock_has_is_damage(tmp_path: Path, number: str) -> None:
    path = tmp_path / "ab.jsonl"
    whole, other = RunEnd(Phase.verified, 5.0), RunEnd(Phase.cold_boot, 77.5)
    path.write_bytes(encode_entry(whole) + encode_entry(other).replace(b"77.5", number.encode()))
    log = read_log(path)
    assert (log.end, log.damaged_lines) == (whole, 1)


@pytest.mark.parametrize("run", ["", "../x", "a/b", "."])
def test_a_run_s_id_is_no_path(host: Host, run: str) -> None:
    with pytest.raises(ValueError, match="not the id of a run"):
        log_path(host.directory, run)
    assert not os.path.exists(host.directory / "runs")
