# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attempts at a handover as the history has them, for the tests of what shows them."""

from dataclasses import replace
from random import Random

from khod.history.model import (
    AttemptRecord,
    AttemptSummary,
    BootCost,
    ClockSource,
    ColdBoot,
    FileOrigin,
    ImageFacts,
    KernelFacts,
    RowKind,
    RunTarget,
    Signer,
    Timeline,
    TimelineRow,
)
from khod.model import (
    Check,
    CheckResult,
    Event,
    EventKind,
    Fate,
    Finding,
    FindingSeverity,
    FindingSource,
    Phase,
    Producer,
    Verdict,
    Word,
)

RUN = "8c1f0a9e4b7d4c2f9d35e6a1b0c47f52"
BEGAN_AT = 1_795_640_400.0
FREEZE = 812.4
"""CLOCK_MONOTONIC of the first freeze, in the kernel before."""
CMDLINE = "BOOT_IMAGE=/boot/vmlinuz-7.3.4 root=/dev/vda1 ro console=ttyS0 kho=on kho_scratch=64M,128M,64M quiet"
BANNER = (
    "Linux version 7.3.4 (build@host) (gcc 14.2.0, GNU ld 2.43) #1 SMP PREEMPT_DYNAMIC Mon Oct 12 09:14:21 UTC 2026"
)
BOOT_BEFORE, BOOT_AFTER = "0f4c1a5e-3d0a-4b6f-9f7e-5a1f1c7f6a01", "b2d9c7f0-6a15-4c55-8a37-0e1d2c3b4a02"
NAMES = ("database", "kv-store")
HOSTILE = "<script>alert(1)</script>\"'&\n\r\x1b[2J\u202egnp.exe" + "x" * 400
"""A text that would forge markup, move a cursor, reverse its line and burst a column."""

PARTS = (
    (RowKind.step, "prepare", -3.2, 1.1),
    (RowKind.step, "load", -2.1, 0.9),
    (RowKind.wait, "wait", -1.2, 1.2),
    (RowKind.step, "freeze", 0.0, 0.42),
    (RowKind.step, "activate", 0.42, 0.03),
    (RowKind.wait, "wait for systemd", 0.45, 0.11),
    (RowKind.shutdown, "shutdown", 0.56, 4.9),
    (RowKind.final, "systemd-shutdown", 5.46, 1.6),
    (RowKind.jump, "LUO preservation and the jump", 7.06, 1.9),
    (RowKind.kernel, "kernel", 8.96, 1.3),
    (RowKind.initrd, "initrd", 10.26, 1.4),
    (RowKind.userspace, "userspace", 11.66, 2.2),
    (RowKind.khod, "khod", 13.86, 0.35),
    (RowKind.restore, "restore", 14.21, 0.79),
)
UNITS = (
    ("user@1000.service", 0.58, 1.21),
    ("postgresql@17-main.service", 0.6, 3.84),
    ("ssh.service", 0.6, 0.04),
    ("systemd-journald.service", 4.9, 0.31),
    ("var-lib-postgresql.mount", 4.46, 0.42),
)
BLACKOUT = 15.0


def orderly_attempt(count: int = 2, error: float = 0.004) -> AttemptRecord:
    """An orderly handover from 7.3.4 to 7.3.4 that was verified, with so many producers and 15 s of blackout."""
    names = list(NAMES[:count]) + [f"vm-{number:03}" for number in range(count - len(NAMES))]
    rows, events = [], [_step_event(Phase.preparing, "Preparing every producer", -3.2, "prepare")]
    random = Random(count)
    for kind, name, begin, seconds in PARTS:
        own = error if kind is RowKind.jump else 0.0
        rows.append(TimelineRow(kind, name, begin, seconds, own))
        if name in ("prepare", "freeze", "restore"):
            for producer in names:
                took = round(seconds * random.uniform(0.05, 0.97), 6)
                rows.append(TimelineRow(RowKind.producer, producer, begin, took, parent=name))
                events.append(producer_event(producer, name, "ready", begin, took))
        if kind is RowKind.shutdown:
            rows += [TimelineRow(RowKind.unit, unit, at, took, parent=name) for unit, at, took in UNITS]
        if kind is RowKind.final:
            rows.append(
                TimelineRow(RowKind.sleep, "sleep", 5.6, 1.0, parent=name, detail="MinimumUptimeSec=15 was waited for")
            )
    words = [Word("quiet", Fate.removed), Word(f"khod.run={RUN}", Fate.added), Word("ro", Fate.kept)]
    events.append(_event(Phase.loaded, "The next kernel's command line", -1.2, words=words))
    return AttemptRecord(
        summary=AttemptSummary(
            run=RUN,
            began_at=BEGAN_AT,
            ended_at=BEGAN_AT + 18.2,
            outcome=Phase.verified,
            reason="",
            from_release="7.3.4",
            to_release="7.3.4",
            blackout_seconds=BLACKOUT,
            blackout_error_seconds=error,
            by="alice (uid 1000) through sudo",
            first_boot_id=BOOT_BEFORE,
            last_boot_id=BOOT_AFTER,
        ),
        origin=KernelFacts("7.3.4", BANNER, BOOT_BEFORE, CMDLINE),
        target=RunTarget(
            KernelFacts("7.3.4", BANNER, "", CMDLINE.replace(" quiet", f" khod.run={RUN}")),
            [
                ImageFacts("kernel", "/boot/vmlinuz-7.3.4", "9f86d081884c7d65" * 4, 14_680_064),
                ImageFacts("initrd", "/boot/initrd.img-7.3.4", "60303ae22b998861" * 4, 48_234_496),
            ],
            costs=[
                BootCost([RowKind.kernel], "console=ttyS0 prints all messages", "Add quiet: `kernel.append=quiet`"),
                BootCost([RowKind.initrd, RowKind.userspace], "rd.debug prints each command", "Leave it out"),
            ],
        ),
        arrived=KernelFacts("7.3.4", BANNER, BOOT_AFTER, CMDLINE),
        generation="stateless",
        verdict=Verdict(
            ["LUO", "kexec-metadata", "reserve_mem"],
            checks=[
                Check("kho", CheckResult.passed, "the kernel was reached by kexec and took over KHO's state", ""),
                Check("release", CheckResult.passed, "7.3.4, as expected", ""),
                Check("content", CheckResult.passed, "database: 256 of 16384 pages compared", ""),
                Check("log", CheckResult.skipped, "the kernel log has wrapped", "Give a larger log_buf_len=."),
            ],
        ),
        findings=[],
        events=events,
        checks=[
            Check("kho", CheckResult.passed, "stateless KHO", ""),
            Check("memory", CheckResult.passed, "412.0 MiB needed, 5.2 GiB free", ""),
            Check("watchdog", CheckResult.warn, "iTCO_wdt runs and stays armed", "Set RuntimeWatchdogSec=off."),
            Check("signature", CheckResult.skipped, "the lockdown level is none", ""),
        ],
        timeline=Timeline(
            rows,
            BLACKOUT,
            error,
            ClockSource.tsc,
            analyze="Startup finished in 1.300s (kernel) + 1.400s (initrd) + 3.611s (userspace) = 6.311s",
        ),
    )


def degraded_attempt(count: int = 2) -> AttemptRecord:
    """One whose clocks were bridged by a wall clock of whole seconds, and in which a file arrived changed."""
    made = orderly_attempt(count, error=1.0)
    findings = [
        Finding("database", "page 17 of 16384 differs", FindingSource.content, "buffer-pool", FindingSeverity.changed),
        Finding.of_producer("kv-store", "the snapshot's checksum is wrong"),
    ]
    verdict = replace(
        Verdict(["LUO"], ["reserve_mem"], ["kexec-metadata"], unknown=["ftrace"]).with_findings(findings),
        checks=[
            Check("kho", CheckResult.passed, "the kernel was reached by kexec and took over KHO's state", ""),
            Check("content", CheckResult.fail, "database: buffer-pool differs", "Restore it from a backup."),
        ],
    )
    refused = producer_event("kv-store", "restore", "the snapshot's checksum is wrong", 14.21, 0.2)
    kept = [event for event in made.events if not _is_restore_of(event, "kv-store")]
    return replace(
        made,
        summary=replace(made.summary, outcome=Phase.degraded, reason=verdict.reason),
        verdict=verdict,
        findings=findings,
        events=[*kept, refused],
        timeline=replace(made.timeline, source=ClockSource.wall),
        trees=["- /kexec-metadata/kexec-count: 3", "+ /kexec-metadata/kexec-count: 4"],
    )


def cold_boot_attempt() -> AttemptRecord:
    """One whose next kernel panicked: nothing arrived, and there is no figure for the blackout."""
    made = orderly_attempt()
    return replace(
        made,
        summary=replace(
            made.summary,
            outcome=Phase.cold_boot,
            reason="the next kernel panicked before it took over the state",
            blackout_seconds=None,
            blackout_error_seconds=0.0,
        ),
        verdict=None,
        timeline=Timeline(
            [row for row in made.timeline.rows if row.begin < 5.4 and row.kind is not RowKind.final],
            unknown=["The time of the jump is not known: the kernel that booted did not come from it."],
        ),
        cold_boot=ColdBoot(
            "the next kernel panicked before it took over the state",
            Phase.executing,
            "systemd-shutdown[1]: Syncing filesystems and block devices.\nsystemd-shutdown[1]: Rebooting with kexec.",
            [
                "[    0.412] KHO: unknown format kho-v9",
                "[    0.413] Kernel panic - not syncing: KHO: cannot restore",
            ],
            watchdog=False,
        ),
    )


def rolled_back_attempt() -> AttemptRecord:
    """One that a producer refused at `freeze`: the host stayed in its kernel, and nothing was stopped for long."""
    made = orderly_attempt()
    reason = "Producer kv-store refused `freeze`: a backup is running"
    events = [event for event in made.events if event.seconds < FREEZE]
    events.append(producer_event("kv-store", "freeze", "a backup is running", 0.0, 0.02))
    events.append(producer_event("database", "thaw", "ready", 0.1, 0.01))
    return replace(
        made,
        summary=replace(
            made.summary,
            outcome=Phase.idle,
            reason=reason,
            blackout_seconds=None,
            blackout_error_seconds=0.0,
            ended_at=BEGAN_AT + 4.0,
            last_boot_id="",
        ),
        arrived=None,
        verdict=None,
        events=events,
        timeline=Timeline([row for row in made.timeline.rows if row.begin < 0.1 and row.begin + row.seconds < 1]),
    )


def hostile_attempt() -> AttemptRecord:
    """One in which every text that comes from others is HOSTILE."""
    made = degraded_attempt()
    facts = KernelFacts(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    check = Check(HOSTILE, CheckResult.fail, HOSTILE, HOSTILE)
    finding = Finding(HOSTILE, HOSTILE, FindingSource.producer, HOSTILE)
    rows = [replace(row, name=HOSTILE, detail=HOSTILE) if row.parent else row for row in made.timeline.rows]
    return replace(
        made,
        summary=replace(
            made.summary, reason=HOSTILE, from_release=HOSTILE, to_release=HOSTILE, by=HOSTILE, first_boot_id=HOSTILE
        ),
        origin=facts,
        target=RunTarget(
            facts,
            [ImageFacts(HOSTILE, HOSTILE, HOSTILE, 1)],
            costs=[BootCost([RowKind.kernel], HOSTILE, HOSTILE)],
            origins=[
                FileOrigin(
                    *(HOSTILE, HOSTILE, HOSTILE, 1, 0.0, [HOSTILE], [Signer(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]),
                    unverified=[HOSTILE],
                )
            ],
        ),
        arrived=facts,
        generation=HOSTILE,
        verdict=Verdict([HOSTILE], [HOSTILE], [HOSTILE], HOSTILE, [finding], [HOSTILE], [check]),
        findings=[finding],
        events=[
            producer_event(HOSTILE, HOSTILE, HOSTILE, 0.0, 1.0),
            _event(Phase.loaded, HOSTILE, 0.0, words=[Word(HOSTILE, Fate.added, HOSTILE)]),
        ],
        checks=[check],
        timeline=replace(made.timeline, rows=rows, unknown=[HOSTILE], analyze=HOSTILE),
        cold_boot=ColdBoot(HOSTILE, Phase.executing, HOSTILE, [HOSTILE], watchdog=True),
        trees=[HOSTILE],
        damage=HOSTILE,
    )


def empty_attempt() -> AttemptRecord:
    """One of which nothing is known but that it began, as where the log was lost."""
    summary = AttemptSummary(
        run=RUN,
        began_at=BEGAN_AT,
        ended_at=0.0,
        outcome=Phase.preparing,
        reason="",
        from_release="",
        to_release="",
        blackout_seconds=None,
        blackout_error_seconds=0.0,
        by="",
        first_boot_id="",
        last_boot_id="",
    )
    return AttemptRecord(
        summary=summary,
        origin=KernelFacts(),
        target=None,
        arrived=None,
        generation="",
        verdict=None,
        findings=[],
        events=[],
        checks=[],
        timeline=Timeline(),
        damage="3 lines of the log were damaged",
    )


def producer_event(name: str, verb: str, answer: str, begin: float, took: float) -> Event:
    """Build the event in which a producer's answer to `verb` came, `took` seconds after it was asked at `begin`."""
    kind = "vm" if name.startswith("vm-") else "peer"
    producer = Producer(name, kind, 0, verb, answer, took, waiting=False, progress=None)
    return Event(
        FREEZE + begin + took,
        Phase.freezing,
        f"{name}: {verb}: {answer}",
        RUN,
        producer,
        kind=EventKind.producer_answered,
        duration=took,
        at=BEGAN_AT + 3.2 + begin + took,
    )


def _is_restore_of(event: Event, name: str) -> bool:
    return event.producer is not None and (event.producer.name, event.producer.phase) == (name, "restore")


def _event(phase: Phase, message: str, begin: float, words: list[Word] | None = None) -> Event:
    return Event(FREEZE + begin, phase, message, RUN, words=words, at=BEGAN_AT + 3.2 + begin)


def _step_event(phase: Phase, message: str, begin: float, step: str) -> Event:
    return replace(_event(phase, message, begin), kind=EventKind.step_began, step=step)
