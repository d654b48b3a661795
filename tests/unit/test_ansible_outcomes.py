# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a handover came to is judged by boot ids and the history: a host that is up again proves nothing."""

from typing import Any

import pytest

from tests.unit.collection import load_util

outcome = load_util("outcome")
summary = load_util("summary")

BEFORE, AFTER = "boot-1", "boot-2"
IDLE = {"active": "inactive", "exit_status": 0, "job": 0}


def attempt(run: str = "new", **fields: object) -> dict[str, Any]:
    common = {"run": run, "outcome": "verified", "refused": False, "reason": "", "from_release": "7.3.4"}
    blackout = {"blackout_seconds": 2.0, "blackout_error_seconds": 0.1}
    return {**common, **blackout, "first_boot_id": BEFORE, "last_boot_id": AFTER, **fields}


def facts(boot_id: str = AFTER, *history: dict[str, Any], **fields: object) -> dict[str, Any]:
    common = {"boot_id": boot_id, "phase": "verified", "outcome": "verified", "kernel": "7.2.12", "verdict": {}}
    return {**common, "last_error": "", "summary": "", "unit": IDLE, "history": list(history), **fields}


def judge(found: dict[str, Any], *known: str) -> Any:
    judged = outcome.judge_handover(found, BEFORE, list(known))
    return judged and judged["outcome"]


def test_it_arrived_if_its_run_began_in_that_boot_and_ended_in_this_one() -> None:
    found = outcome.judge_handover(facts(AFTER, attempt(), attempt("old")), BEFORE, ["old"])
    assert (found["outcome"], found["run"], found["blackout_seconds"]) == ("verified", "new", 2.0)
    assert (found["previous_kernel"], found["kernel"]) == ("7.3.4", "7.2.12")


@pytest.mark.parametrize("ended", ["verified", "degraded", "cold_boot"])
def test_the_outcome_is_that_of_the_history(ended: str) -> None:
    assert judge(facts(AFTER, attempt(outcome=ended), phase=ended, outcome=ended)) == ended


def test_a_verified_run_of_earlier_proves_nothing() -> None:
    """The status is verified, but by a run the history had before, or one of another boot: the row is still to come."""
    assert judge(facts(AFTER, attempt("old")), "old") is None
    assert judge(facts(AFTER, attempt(first_boot_id="boot-0"))) is None
    assert judge(facts(AFTER, attempt(last_boot_id=""))) is None


def test_another_boot_without_the_run_is_a_cold_boot() -> None:
    assert judge(facts(AFTER, phase="idle", outcome="idle")) == "cold_boot"
    assert judge(facts(AFTER, phase="cold_boot", outcome="cold_boot")) == "cold_boot"


def test_it_is_open_while_anything_is_at_work() -> None:
    assert judge(facts(AFTER, attempt(), phase="verifying")) is None
    assert judge(facts(BEFORE, phase="preparing")) is None
    assert judge(facts(BEFORE, phase="idle", unit=IDLE | {"active": "activating"})) is None
    assert judge(facts(BEFORE, phase="idle", unit=IDLE | {"job": 7})) is None


@pytest.mark.parametrize(
    ("found", "ended"),
    [
        (facts(BEFORE, attempt(refused=True, last_boot_id=""), phase="idle"), "refused"),
        (facts(BEFORE, attempt(outcome="idle", last_boot_id=""), phase="idle"), "rolled_back"),
        (facts(BEFORE, attempt(outcome="failed", last_boot_id=""), phase="failed"), "not_rolled_back"),
        (facts(BEFORE, phase="idle", unit=IDLE | {"exit_status": 3}), "refused"),
        (facts(BEFORE, phase="idle", unit=IDLE | {"exit_status": 2}), "refused"),
        (facts(BEFORE, phase="idle", unit=IDLE | {"exit_status": 4}), "no_kho"),
        (facts(BEFORE, phase="idle", unit=IDLE | {"exit_status": 6}), "not_rolled_back"),
    ],
)
def test_in_the_same_boot_it_ended_without_a_jump(found: dict[str, Any], ended: str) -> None:
    assert judge(found) == ended


def test_a_later_reboot_by_someone_else_does_not_undo_the_proof() -> None:
    """An interrupted roll-out that comes back late: the handover is in the history, whatever boot this is."""
    assert judge(facts("boot-3", attempt(), phase="idle", outcome="idle")) == "verified"


PLAN = {"release": "7.2.12", "digests": ["k", "i"], "cmdline": "kho=on root=/dev/vda khod.run=1"}
LED = {
    "target": {
        "kernel": {"cmdline": "root=/dev/vda kho=on kho=on khod.run=2"},
        "images": [{"digest": "k"}, {"digest": "i"}],
    }
}


def test_there_is_nothing_to_do_in_the_target() -> None:
    """The order of the words does not matter, nor one that a repeated `append` has added again."""
    assert outcome.find_reason_to_begin(facts(), LED, PLAN) == ""


@pytest.mark.parametrize(
    ("found", "led", "plan", "reason"),
    [
        (facts(outcome="idle"), None, PLAN, "No verified handover"),
        (facts(outcome="degraded"), LED, PLAN, "No verified handover"),
        (facts(), LED, PLAN | {"release": "7.4"}, "the target is 7.4"),
        (facts(), LED, PLAN | {"digests": ["k", "other"]}, "another file"),
        (facts(), LED, PLAN | {"cmdline": "root=/dev/vda"}, "command line"),
    ],
)
def test_a_handover_is_needed_where_anything_differs(
    found: dict[str, Any], led: dict[str, Any] | None, plan: dict[str, Any], reason: str
) -> None:
    assert reason in outcome.find_reason_to_begin(found, led, plan)


def test_past_blackouts_are_those_before_the_run_in_the_order_of_the_history() -> None:
    """No clock is asked: a host whose clock was set back has the same history."""
    history = [attempt("3"), attempt("new"), attempt("2", outcome="degraded"), attempt("1"), attempt("0")]
    assert outcome.list_past_blackouts(history, "new") == [2.0, 2.0]
    assert outcome.list_past_blackouts([attempt("0", blackout_seconds=None)], "new") == []


def test_a_host_cannot_write_to_the_terminal_of_the_controller() -> None:
    lines = summary.draw_table({"h1": {"outcome": "degraded", "kernel": "\x1b[2Jx\n", "reason": ""}})
    assert all(line.isprintable() for line in lines)
    (reason,) = summary.find_reasons_to_stop({"h1": {"outcome": "degraded", "reason": "\x1b]0;owned\x07"}})
    assert reason.isprintable()
