# SPDX-License-Identifier: LGPL-2.1-or-later
"""A handover that ended as a cold boot, explained from every kind of evidence."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from khoctl.status_page import render_status
from khod.abi.calls import HostCalls
from khod.engine.cold_boot import gather_cold_boot
from khod.handover.cold_boot import ColdBootEvidence, explain_cold_boot
from khod.handover.record import Record
from khod.history.trial import counts_against_image
from khod.kernel.host import reset_by_watchdog
from khod.model import ColdBoot, Phase, StepTiming
from khod.producers.hooks import Hook
from khod.simulated.kernel import Rebooted
from khod.systemd.boots import BootEnd
from tests.unit.harness import Host

BEFORE, NEXT = "6fd2b6c4-2c0c-4a0e-8a4e-6e4b5e1d7a11", "00000000000000000000000000000002"
RUN, RELEASE = "0123456789ab", "7.3.4"
ORDERLY = BootEnd(BEFORE.replace("-", ""), 1e9, "Journal stopped", in_order=True, target="kexec.target")
CUT_OFF = BootEnd(ORDERLY.boot_id, 1e9, "khod: the jump is asked for", in_order=False)
REBOOTED = BootEnd(ORDERLY.boot_id, 1e9, "Journal stopped", in_order=True, target="reboot.target")
REACHED = BootEnd(NEXT, 1e9, "up", in_order=False, release="7.2.12", run=RUN)
PANIC = ["[1.2] Kernel panic - not syncing: VFS: no root"]
DEAD_NEXT = [*PANIC, "[1.3] CPU: 0 UID: 0 PID: 1 Comm: swapper/0 Not tainted 7.2.12-luo6 #1 PREEMPT"]
DEAD_SAME = [*PANIC, "[1.3] CPU: 0 UID: 0 PID: 1 Comm: swapper/0 Tainted: G  OE 7.3.4 #1 PREEMPT"]
DEAD_LATE = ["[ 9.2] Kernel panic - not syncing: VFS: no root", *DEAD_SAME[1:]]
FAILED = ["systemd-shutdown[1]: Rebooting with kexec.", "systemd-shutdown[1]: Rebooting."]
JUMPED = ["[9.1] kexec_core: Starting new kernel"]


def explained(evidence: ColdBootEvidence, phase: Phase = Phase.executing, *, at_once: bool = False) -> ColdBoot:
    known = ColdBoot("unexplained", phase, boot_id=BEFORE, is_image_suspect=phase is not Phase.idle)
    timings = (StepTiming("load", 5.0, 0.1),)
    return explain_cold_boot(
        Record(cold_boot=known, run=RUN, previous_release=RELEASE, timings=timings, at_once=at_once), evidence
    )


@pytest.mark.parametrize(
    ("evidence", "at_once", "words"),
    [
        (ColdBootEvidence([ORDERLY], DEAD_NEXT), False, "the next kernel (7.2.12-luo6) panicked: VFS: no root"),
        (ColdBootEvidence([ORDERLY], DEAD_SAME), False, "the next kernel (7.3.4) panicked: VFS: no root"),
        (ColdBootEvidence([ORDERLY], DEAD_LATE), False, "a kernel 7.3.4 panicked: VFS: no root"),
        (ColdBootEvidence([REACHED, ORDERLY], PANIC), False, "the next kernel (7.2.12) panicked: VFS: no root"),
        (ColdBootEvidence([ORDERLY], JUMPED, watchdog=True), False, "the next kernel did not come up in time"),
        (ColdBootEvidence([REACHED, ORDERLY]), False, "the next kernel (7.2.12) started"),
        (ColdBootEvidence([ORDERLY], FAILED), False, "reboot(2) did not jump"),
        (ColdBootEvidence([CUT_OFF], JUMPED), False, "the host was reset in the jump"),
        (ColdBootEvidence([CUT_OFF]), True, "the host was reset in the jump"),
        (ColdBootEvidence([CUT_OFF]), False, "the shutdown before the jump was cut off"),
        (ColdBootEvidence([ORDERLY]), False, "did not come up in the next kernel"),
        (ColdBootEvidence([REBOOTED]), False, "into reboot.target instead of the jump"),
        (ColdBootEvidence(watchdog=False), False, "unexplained"),
    ],
)
def test_the_most_certain_cause_is_named(evidence: ColdBootEvidence, at_once: bool, words: str) -> None:
    found = explained(evidence, at_once=at_once)
    assert words in found.reason
    assert found.reason.isprintable()
    assert (found.last_words, found.watchdog) == (evidence.words, evidence.watchdog)
    assert found.journal_end


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (ColdBootEvidence([CUT_OFF], DEAD_SAME), "panicked while the handover was verified: VFS: no root"),
        (ColdBootEvidence([CUT_OFF], watchdog=True), "hung while the handover was verified"),
        (ColdBootEvidence([CUT_OFF]), "ended without a shutdown while the handover was verified"),
        (ColdBootEvidence([REBOOTED]), "was shut down in order into reboot.target before the handover was verified"),
    ],
)
def test_the_kernel_that_was_verified_is_the_one_that_died(evidence: ColdBootEvidence, words: str) -> None:
    found = explained(evidence, Phase.verifying)
    assert found.reason.startswith(f"the next kernel ({RELEASE})")
    assert words in found.reason


@pytest.mark.parametrize(
    ("evidence", "phase", "is_suspect"),
    [
        (ColdBootEvidence([ORDERLY]), Phase.executing, True),
        (ColdBootEvidence([ORDERLY], FAILED), Phase.executing, False),
        (ColdBootEvidence([ORDERLY], [*FAILED, *DEAD_NEXT]), Phase.executing, True),
        (ColdBootEvidence([REBOOTED]), Phase.executing, False),
        (ColdBootEvidence([REACHED, REBOOTED]), Phase.executing, True),
        (ColdBootEvidence([CUT_OFF]), Phase.executing, True),
        (ColdBootEvidence(), Phase.executing, True),
        (ColdBootEvidence([CUT_OFF]), Phase.verifying, True),
        (ColdBootEvidence([REBOOTED]), Phase.verifying, False),
        (ColdBootEvidence([REBOOTED], DEAD_SAME), Phase.verifying, True),
        (ColdBootEvidence([ORDERLY], DEAD_NEXT), Phase.idle, False),
    ],
)
def test_an_image_that_was_certainly_not_the_cause_is_not_suspected(
    evidence: ColdBootEvidence, phase: Phase, is_suspect: bool
) -> None:
    assert explained(evidence, phase).is_image_suspect is is_suspect


def test_a_shutdown_before_the_jump_is_nobody_s_death() -> None:
    assert explained(ColdBootEvidence([ORDERLY], DEAD_NEXT), Phase.idle).reason == "unexplained"


def test_a_journal_that_keeps_nothing_is_said() -> None:
    assert explained(ColdBootEvidence(problems=["reading pstore failed: EIO"])).journal_end == (
        "the journal has nothing of the boots before; reading pstore failed: EIO"
    )


async def test_whatever_fails_is_named_and_nothing_is_raised(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_path: str) -> list[BootEnd]:
        raise RuntimeError("a damaged journal")

    def unreadable(_path: str) -> list[str]:
        raise PermissionError(1, "not permitted", "pstore")

    monkeypatch.setattr(host.kernel, "list_directory", unreadable)
    record = Record(cold_boot=ColdBoot("cold", Phase.executing, boot_id=BEFORE))
    found = await gather_cold_boot(record, host.kernel, broken)
    assert found.reason == "cold"
    assert "a damaged journal" in found.journal_end
    assert (found.watchdog, found.last_words) == (None, [])


def lay_pstore(host: Host, text: str) -> None:
    path: Path = host.kernel.host_path("/sys/fs/pstore/dmesg-ramoops-0")
    path.parent.mkdir(parents=True)
    path.write_text(text)


async def test_khod_explains_a_cold_boot_and_keeps_the_explanation(host: Host) -> None:
    engine = await host.started()
    before = host.kernel.read_file("/proc/sys/kernel/random/boot_id").decode().strip()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    lay_pstore(host, "\n".join(DEAD_NEXT))
    asked = []

    def journal(here: str, until: str) -> list[BootEnd]:
        asked.append((here, until))
        return [ORDERLY]

    host.boot_ends = journal
    engine = host.engine()
    told = asyncio.ensure_future(host.seen(lambda event: "panicked" in event.message))
    await engine.start()
    await told
    found = await engine.queries.status()
    assert found.phase is Phase.cold_boot
    assert found.cold_boot is not None
    assert found.cold_boot.last_phase is Phase.executing
    assert found.cold_boot.boot_id == before
    assert found.cold_boot.is_image_suspect
    assert found.image
    page = render_status(found)
    for words in (found.image, "panicked: VFS: no root", "executing", "Not tainted 7.2.12-luo6"):
        assert words in page

    again = await (await host.started()).queries.status()
    assert again.cold_boot == found.cold_boot
    assert len(asked) == 1, "a khod that is restarted has it in its record"


async def test_the_answer_of_a_journal_that_hangs_is_not_waited_for(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    loop, release, reached = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def hang(_here: str, _until: str) -> list[BootEnd]:
        loop.call_soon_threadsafe(reached.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return [ORDERLY]

    host.boot_ends = hang
    engine = await host.started()
    await reached.wait()
    found = await engine.queries.status()
    assert found.cold_boot is not None
    assert found.cold_boot.journal_end == ""
    await engine.activate()
    release.set()
    await host.seen(lambda event: "the cold boot" in event.message)
    assert (await engine.queries.status()).phase is Phase.active


@pytest.mark.parametrize(("status", "found"), [("32", True), ("0", False), ("48", True), ("16", False), ("x", None)])
def test_a_reset_by_a_watchdog_is_its_driver_s_word(tmp_path: Path, status: str, found: bool | None) -> None:
    """WDIOF_CARDRESET is 0x20, include/uapi/linux/watchdog.h."""
    assert reset_by_watchdog(HostCalls(tmp_path)) is None
    (tmp_path / "sys/class/watchdog/watchdog0").mkdir(parents=True)
    assert reset_by_watchdog(HostCalls(tmp_path)) is None, "CONFIG_WATCHDOG_SYSFS may be off"
    (tmp_path / "sys/class/watchdog/watchdog0/bootstatus").write_text(f"{status}\n")
    assert reset_by_watchdog(HostCalls(tmp_path)) is found


@pytest.mark.parametrize("down", [True, False])
async def test_a_shutdown_during_the_verification_is_recorded(host: Host, down: bool) -> None:
    host.hooks.append(Hook("slow", 60.0, (), commands={"restore": ["/bin/sleep", "60"]}))
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    engine = await host.started()
    assert host.record.phase is Phase.verifying
    await engine.stop(jumping=False, going_down=down)
    assert bool(host.record.interrupted) is down


async def test_the_explanation_is_remembered_with_the_attempt(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    run = host.record.run
    lay_pstore(host, "\n".join(DEAD_NEXT))
    host.boot_ends = lambda _here, _until: [ORDERLY]
    engine = await host.started()
    attempt = await host.remembered(2)
    assert (attempt.summary.run, attempt.summary.outcome) == (run, Phase.cold_boot)
    assert attempt.summary.reason == "the next kernel (7.2.12-luo6) panicked: VFS: no root"
    assert attempt.cold_boot == (await engine.queries.status()).cold_boot


async def test_a_run_that_begins_meanwhile_has_a_log_of_its_own(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    cold, loop, release = host.record.run, asyncio.get_running_loop(), asyncio.Event()

    def hang(_here: str, _until: str) -> list[BootEnd]:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return [ORDERLY]

    host.boot_ends = hang
    engine = await host.started()
    await engine.activate()
    release.set()
    first = await host.remembered(2)
    await engine.abort()
    second = await host.remembered(3)
    assert (first.summary.run, first.summary.outcome) == (cold, Phase.cold_boot)
    assert second.summary.run not in ("", cold)
    assert {event.run for event in second.events} == {second.summary.run}
    assert any(event.step == "prepare" for event in second.events)


async def test_a_cold_boot_counts_before_it_is_explained(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    run, loop, release = host.record.run, asyncio.get_running_loop(), asyncio.Event()

    def hang(_here: str, _until: str) -> list[BootEnd]:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return [ORDERLY]

    host.boot_ends = hang
    await host.started()
    attempt = await host.remembered()
    assert (attempt.summary.run, counts_against_image(attempt)) == (run, True)
    release.set()
    await host.remembered(2)


async def test_a_khod_that_died_before_the_explanation_is_made_up_for(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    run = host.record.run
    await host.started()
    await host.remembered(2)
    cold = host.record.cold_boot
    assert cold is not None
    host.store.write(replace(host.record, cold_boot=replace(cold, journal_end="")))
    host.attempts.clear()
    lay_pstore(host, "\n".join(DEAD_NEXT))
    await host.started()
    attempt = await host.remembered(2)
    assert (attempt.summary.run, counts_against_image(attempt)) == (run, True)
    assert "panicked" in attempt.summary.reason


async def test_a_handover_that_a_shutdown_rolled_back_does_not_count_against_its_image(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    run = host.record.run
    await engine.stop(jumping=False, going_down=True)
    assert host.record.interrupted
    await host.remembered()
    host.kernel._boot_kernel("root=/dev/sim rw")
    await host.started()
    attempt = await host.remembered(3)
    assert (attempt.summary.run, attempt.summary.outcome) == (run, Phase.cold_boot)
    assert attempt.target is not None
    assert attempt.target.images
    assert not counts_against_image(attempt)
