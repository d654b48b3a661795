# SPDX-License-Identifier: LGPL-2.1-or-later
"""The terms of a handover, which are its profile's: what khod holds the run to, and how they judge its verdict."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from khod.config import apply_terms
from khod.errors import KhoError, Refused, UsageError
from khod.handover.terms import judge_verdict
from khod.history.model import Arrival, ClockReading, ClockSource, KernelFacts, Moment
from khod.history.trial import counts_against_image
from khod.kernel.kexec import Kexec
from khod.model import (
    NO_TERMS,
    Check,
    CheckResult,
    Finding,
    FindingSource,
    Phase,
    Terms,
    TermsDeadlines,
    Verdict,
)
from khod.server import announcements
from khod.server.announcements import MAX_ANNOUNCEMENTS, Announcements
from khod.server.terms import check_terms
from khod.simulated.kernel import Rebooted
from khod.target.target import Request
from tests.unit.harness import Host
from tests.unit.scripted import Scripted
from tests.unit.test_blackout import FINISH, FREEZE, JUMP, RESTORE, WallClock, clock

__all__ = ["clock"]
BLACKOUT = FREEZE + JUMP + RESTORE + FINISH


async def arrive(
    host: Host, clock: WallClock, terms: Terms, *, jump: float = JUMP, jumped: Callable[[], None] = lambda: None
) -> None:
    """Hand over on these terms, with a blackout of BLACKOUT seconds by the wall clock, and wait for the verdict."""
    takes = clock.takes
    Scripted(host, "a", restores=True, freeze=takes(FREEZE), restore=takes(RESTORE), finish=takes(FINISH))
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine, terms=terms)
    clock.now += jump
    jumped()
    engine = await host.started()
    while engine.record.outcome is Phase.idle:
        await host.seen(lambda _event: True)


@pytest.mark.parametrize(
    ("budget", "outcome", "result"),
    [(BLACKOUT, Phase.verified, CheckResult.passed), (BLACKOUT - 0.25, Phase.degraded, CheckResult.fail)],
)
async def test_a_blackout_over_the_budget_makes_the_handover_degraded(
    host: Host, clock: WallClock, budget: float, outcome: Phase, result: CheckResult
) -> None:
    await arrive(host, clock, Terms("nightly", blackout_budget=budget))
    found, verdict = host.record, host.record.verdict
    assert (found.outcome, verdict and [c.result for c in verdict.checks if c.name == "blackout"]) == (
        outcome,
        [result],
    )
    over = outcome is Phase.degraded
    assert verdict is not None
    assert [finding.source for finding in verdict.findings] == [FindingSource.blackout] * over
    assert (f"longer than its budget of {budget:g} s" in found.last_error) == over
    attempt = await host.remembered(1)
    assert (attempt.summary.outcome, attempt.terms) == (outcome, Terms("nightly", blackout_budget=budget))
    assert not counts_against_image(attempt)


async def test_the_first_verdict_is_by_the_clocks_of_both_kernels(host: Host, clock: WallClock) -> None:
    """The wall clock was set in the jump: by it alone the blackout is over the budget, and a role would stop."""

    def read_clocks(moment: Moment) -> ClockReading:
        now, boot_id = time.monotonic(), Kexec(host.kernel).boot_id()
        return ClockReading(moment, boot_id, now, now, clock.now, 0.001, ptp=now, ptp_name="KVM virtual PTP")

    async def read_arrival(kernel: KernelFacts) -> Arrival:
        return Arrival(kernel, began_monotonic=began[-1])

    began = [0.0]
    host.sources = replace(
        host.sources, read_clocks=read_clocks, read_arrival=read_arrival, read_begin=lambda: began[-1]
    )
    terms = Terms("nightly", blackout_budget=3000.0)
    # Both boots have this machine's uptime: a jump of about that length by the wall clock would be no contradiction.
    jump = 6000.0 + time.monotonic()
    await arrive(host, clock, terms, jump=jump, jumped=lambda: began.append(time.monotonic()))
    attempt = await host.remembered(2)
    assert (attempt.timeline.source, attempt.summary.outcome) == (ClockSource.ptp, Phase.verified)
    assert Phase.degraded not in {event.phase for event in host.events}


async def test_the_terms_of_this_boot_outlive_the_next_handover(host: Host, clock: WallClock) -> None:
    """A verdict that is corrected later, for a producer that comes late, is judged by its own terms."""
    await arrive(host, clock, terms := Terms("nightly", blackout_budget=60.0))
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    assert (engine.record.terms, engine.record.arrived_terms) == (NO_TERMS, terms)
    assert (await engine.queries.status()).terms == NO_TERMS
    await engine.abort()
    status = await engine.queries.status()
    assert (status.terms, status.arrived_run) == (terms, engine.record.arrived_run)


async def test_the_next_call_of_a_handover_keeps_its_terms(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True, terms=(terms := Terms("nightly", blackout_budget=9.0)))
    assert (host.record.terms, host.record.begun.profile) == (terms, "nightly")
    await engine.abort()
    assert host.record.phase is Phase.idle


async def test_a_required_producer_that_is_not_there_refuses_this_handover_only(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    with pytest.raises(Refused, match="Required and not here: b"):
        await host.kexec(engine, load_only=True, terms=Terms(require=["a", "b"]))
    assert host.verbs == []
    attempt = await host.remembered()
    assert (attempt.summary.refused, attempt.terms) == (True, Terms(require=["a", "b"]))
    with host.request(load_only=True, terms=Terms(require=["b"])) as request:
        checks = {check.name: check.result for check in await engine.queries.check(request)}
    assert checks["producers"] is CheckResult.fail
    await host.kexec(engine, load_only=True)
    assert host.record.phase is Phase.loaded


async def test_a_deadline_of_the_terms_ends_the_step(host: Host) -> None:
    host.hook("slow", {"freeze": "sleep 60"})
    engine = await host.started()
    with pytest.raises(KhoError, match=r"within 0.2 s"):
        await host.kexec(engine, load_only=True, terms=Terms(deadlines=TermsDeadlines(freeze=0.2)))
    assert host.verbs[-1] == "slow cancel"
    with host.request(load_only=True, terms=Terms(deadlines=TermsDeadlines(prepare=7.0))) as request:
        plan = await engine.queries.plan(request)
    assert "7 s at most" in plan.steps[0].does


def test_terms_change_only_what_they_name(host: Host) -> None:
    assert apply_terms(host.config, NO_TERMS) == host.config
    found = apply_terms(host.config, Terms(require=["b", "a"], deadlines=TermsDeadlines(restore=5.0)))
    before = asdict(host.config.deadlines)
    assert asdict(found.deadlines) == before | {"restore": 5.0}
    assert found.producers.require == (*host.config.producers.require, "b", "a")


async def test_a_window_that_closes_before_the_first_step_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks and the images take their time: it is looked at after them, not only when the command is typed."""
    host.hook("a")
    engine = await host.started()
    ends = time.time() + 3600
    late: list[float] = [0.0]
    monkeypatch.setattr("khod.engine.admission.time.time", lambda: ends + late[0])
    terms = Terms("nightly", begin_before=ends, window="22:00-04:00")
    with pytest.raises(Refused, match=r"window of the handover has closed \(22:00-04:00\)"):
        await host.kexec(engine, load_only=True, terms=terms)
    assert (host.verbs, host.record.phase) == ([], Phase.idle)
    late[0] = -0.5
    await host.kexec(engine, load_only=True, terms=terms)
    late[0] = 60.0
    await engine.kexec(Request(load_only=True))  # what has begun goes on
    assert host.record.phase is Phase.loaded


LOG = Finding("", "the kernel complains: oops", FindingSource.log)
LOST = Finding("", "missing", FindingSource.kernel, "ftrace")
CHECKS = [
    Check("kernel", CheckResult.skipped, "no mark", ""),
    Check("log", CheckResult.fail, "oops", ""),
    Check("health web", CheckResult.passed, "", ""),
    Check("health db", CheckResult.warn, "slow", ""),
]


@pytest.mark.parametrize(
    ("terms", "kept", "tolerated"),
    [
        (Terms(tolerate=["log"]), [LOST], [LOG]),
        (Terms(tolerate=["health", "boot"]), [LOG, LOST], []),
        (Terms(must_pass=["health"]), [LOG, LOST, "health"], []),
        (Terms(must_pass=["health web"]), [LOG, LOST], []),
        (Terms(must_pass=["kernel", "luo"]), [LOG, LOST, "kernel", "luo"], []),
        (Terms(must_pass=["log"], tolerate=["log"]), [LOST, "log"], [LOG]),
        (Terms(blackout_budget=1.0), [LOG, LOST], []),
    ],
)
def test_the_policy_of_the_verification(terms: Terms, kept: list[Finding | str], tolerated: list[Finding]) -> None:
    """A name in `kept` is that of a check that is required and has not passed."""
    verdict = judge_verdict(Verdict(checks=CHECKS).with_findings([LOG, LOST]), terms, None, 1.0)
    found = [one.subject if one.source is FindingSource.profile else one for one in verdict.findings]
    assert (found, verdict.tolerated) == (kept, tolerated)
    assert judge_verdict(verdict, terms, None, 1.0) == verdict
    assert bool(verdict.reason) == bool(kept)


def test_a_blackout_that_is_not_known_is_no_pass() -> None:
    verdict = judge_verdict(Verdict(), Terms(blackout_budget=1.0, must_pass=["blackout"]), None, 1.0)
    assert [check.result for check in verdict.checks] == [CheckResult.skipped]
    assert [finding.subject for finding in verdict.findings] == ["blackout"]
    measured = judge_verdict(verdict, Terms(blackout_budget=1.0, must_pass=["blackout"]), 0.9, 0.1)
    assert (measured.findings, [check.result for check in measured.checks]) == ([], [CheckResult.passed])


@pytest.mark.parametrize(
    ("terms", "where"),
    [
        (Terms(blackout_budget=0.0), "terms.blackout_budget"),
        (Terms(blackout_budget=float("nan")), "terms.blackout_budget"),
        (Terms(deadlines=TermsDeadlines(freeze=1e9)), "terms.deadlines.freeze"),
        (Terms(tolerate=["kernel"]), "terms.tolerate"),
        (Terms(tolerate=["blackout"]), "terms.tolerate"),
        (Terms(must_pass=["health web", "kernal"]), "terms.must_pass"),
    ],
)
def test_terms_that_are_not_valid(terms: Terms, where: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_terms(terms)
    assert raised.value.where == where


def test_texts_of_a_caller_are_one_line_and_who_asked_stands_once() -> None:
    found = check_terms(Terms("a\nb", asked_by="me", require=["x\x1b[2J"], window="w\n"))
    assert found.profile is not None
    assert "\n" not in found.profile
    assert (found.asked_by, found.require) == (None, ["x?[2J"])


def test_an_announcement_is_taken_once_and_only_while_it_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    found, now = Announcements(), [100.0]
    monkeypatch.setattr("khod.server.announcements.time.monotonic", lambda: now[0])
    found.announce_run("nightly", "user 1000", ignore_window=True)
    assert found.take_announcement("weekly").by == ""
    taken = found.take_announcement("nightly")
    assert (taken.by, taken.ignore_window) == ("user 1000", True)
    assert found.take_announcement("nightly").by == ""
    found.announce_run("nightly", "user 1000", ignore_window=False)
    now[0] += announcements.ANNOUNCED_SECONDS + 1
    assert found.take_announcement("nightly").by == ""
    for number in range(MAX_ANNOUNCEMENTS + 1):
        found.announce_run(str(number), "user 1000", ignore_window=False)
    assert (found.take_announcement("0").by, found.take_announcement("1").by) == ("", "user 1000")
