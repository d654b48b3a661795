# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record against kernel at every start: each row of the design's table, and what lies between the rows."""

from dataclasses import replace

import pytest

from khod.errors import RecordError
from khod.handover.machine import HELD, RESTING, STEPS
from khod.handover.reconcile import Action, effective_phase, is_foreign, reconcile_record, reset_record, steps_to_undo
from khod.handover.record import Record
from khod.model import Generation, Observed, Phase, Step

P, S = Phase, Step
HERE, BEFORE, RUN = "boot-here", "boot-before", "r1"
IDLE = Observed(HERE, "6.8.0", active=False, loaded=False, arrived=False, cmdline="root=/dev/sda")
ACTIVE, LOADED, BOTH = replace(IDLE, active=True), replace(IDLE, loaded=True), replace(IDLE, active=True, loaded=True)
ARRIVED = replace(IDLE, arrived=True, cmdline=f"root=/dev/sda khod.run={RUN}")
BEGUN = {
    P.preparing: (S.prepare,),
    P.prepared: (S.prepare,),
    P.quiescing: (S.prepare, S.quiesce),
    P.quiesced: (S.prepare, S.quiesce),
    P.freezing: (S.prepare, S.freeze),
    P.frozen: (S.prepare, S.freeze),
    P.activating: (S.prepare, S.freeze, S.activate),
    P.active: (S.prepare, S.freeze, S.activate),
    P.loading: (S.prepare, S.freeze, S.activate, S.load),
    P.loaded: (S.prepare, S.freeze, S.activate, S.load),
    P.executing: tuple(Step),
}


def record(phase: Phase, boot: str = HERE, done: tuple[Step, ...] | None = None) -> Record:
    begun = BEGUN.get(phase, ()) if done is None else done
    return Record(phase=phase, done=begun, run=RUN, boot_id=boot, release="6.7.0", generation=Generation.sysfs)


def kernel_at(phase: Phase) -> Observed:
    """Where the kernel is when the record tells the truth about a v3 kernel."""
    done = BEGUN.get(phase, ())
    return replace(IDLE, active=S.activate in done, loaded=S.load in done)


# none or idle | idle | idle


@pytest.mark.parametrize("kept", [None, record(P.idle), record(P.idle, BEFORE)])
def test_nothing_recorded_and_nothing_there_is_idle(kept: Record | None) -> None:
    found = reconcile_record(kept, IDLE)
    assert (found.phase, found.action) == (P.idle, Action.none)


@pytest.mark.parametrize("phase", sorted(RESTING, key=str))
def test_the_outcome_of_this_boot_is_kept_and_that_of_another_is_not(phase: Phase) -> None:
    assert reconcile_record(record(phase), IDLE).phase is phase
    assert reconcile_record(record(phase, BEFORE), IDLE).phase is P.idle


def test_a_kernel_without_an_active_phase_is_idle() -> None:
    assert reconcile_record(None, replace(IDLE, active=None)).phase is P.idle


# some phase, same boot | agrees | roll back or resume


@pytest.mark.parametrize("phase", list(BEGUN))
def test_a_daemon_that_died_is_rolled_back(phase: Phase) -> None:
    found = reconcile_record(record(phase), kernel_at(phase))
    assert (found.phase, found.action) == (phase, Action.roll_back)
    assert found.reason


@pytest.mark.parametrize("phase", list(BEGUN))
def test_resume_is_for_the_phases_a_handover_may_wait_in(phase: Phase) -> None:
    found = reconcile_record(record(phase), kernel_at(phase), "resume")
    assert (found.phase, found.action) == (phase, Action.resume if phase in HELD else Action.roll_back)


@pytest.mark.parametrize(("phase", "kernel"), [(P.activating, IDLE), (P.activating, ACTIVE), (P.loading, ACTIVE)])
def test_a_step_under_way_may_have_had_its_effect_or_not(phase: Phase, kernel: Observed) -> None:
    assert reconcile_record(record(phase), kernel).action is Action.roll_back


def test_a_rollback_under_way_goes_on_wherever_the_kernel_is() -> None:
    for kernel in (IDLE, ACTIVE, LOADED, BOTH):
        found = reconcile_record(record(P.rolling_back, done=BEGUN[P.loaded]), kernel)
        assert (found.phase, found.action) == (P.rolling_back, Action.roll_back)


@pytest.mark.parametrize(("phase", "active"), [(P.prepared, None), (P.active, None), (P.loaded, None)])
def test_a_kernel_with_nothing_to_leave_contradicts_no_active_phase(phase: Phase, active: None) -> None:
    found = reconcile_record(record(phase), replace(kernel_at(phase), active=active))
    assert (found.phase, found.action) == (phase, Action.roll_back)


# none or idle | active or loaded | foreign


DRIVEN = [ACTIVE, LOADED, BOTH, replace(LOADED, active=None)]


@pytest.mark.parametrize("kept", [None, *(record(phase, boot) for phase in RESTING for boot in (HERE, BEFORE))])
@pytest.mark.parametrize("kernel", DRIVEN)
def test_somebody_else_s_doing_is_foreign_and_not_touched(kept: Record | None, kernel: Observed) -> None:
    found = reconcile_record(kept, kernel)
    assert found.action is Action.none
    assert is_foreign(reset_record(kept or Record(), found, kernel), kernel)


@pytest.mark.parametrize("kernel", DRIVEN)
@pytest.mark.parametrize("phase", [P.verified, P.degraded, P.cold_boot])
def test_somebody_else_s_doing_does_not_hide_what_this_boot_came_to(phase: Phase, kernel: Observed) -> None:
    kept = record(phase, done=())
    assert reconcile_record(kept, kernel).phase is phase
    assert effective_phase(kept, kernel) is phase
    assert effective_phase(record(P.idle, done=()), kernel) is P.foreign


# executing, other boot | KHO state came in | verify


def test_state_that_came_in_is_verified() -> None:
    found = reconcile_record(record(P.executing, BEFORE), ARRIVED)
    assert (found.phase, found.action) == (P.verifying, Action.verify)


def test_the_mark_without_any_state_is_verified_too_and_cannot_be_a_success() -> None:
    """The issue: 6.19.11 to 7.3.4 boots and hands over nothing; khod says degraded, not cold boot."""
    found = reconcile_record(record(P.executing, BEFORE), replace(ARRIVED, arrived=False))
    assert (found.phase, found.action) == (P.verifying, Action.verify)


def test_a_verification_cut_short_is_done_again() -> None:
    found = reconcile_record(record(P.verifying), ARRIVED)
    assert (found.phase, found.action) == (P.verifying, Action.verify)


# executing, other boot | no KHO state | cold boot


def test_no_state_and_no_mark_is_a_cold_boot() -> None:
    found = reconcile_record(record(P.executing, BEFORE), IDLE)
    assert (found.phase, found.action) == (P.cold_boot, Action.none)
    assert "6.7.0" in found.reason, "what is known is said"


def test_another_run_s_mark_is_not_this_one_s() -> None:
    """The running command line was reused by hand."""
    kernel = replace(IDLE, cmdline=f"root=/dev/sda khod.run={RUN}2")
    assert reconcile_record(record(P.executing, BEFORE), kernel).phase is P.cold_boot


# anything else | anything else | inconsistent, by name, with what was found

CONTRADICTIONS = [
    (P.preparing, ACTIVE),
    (P.prepared, LOADED),
    (P.frozen, ACTIVE),
    (P.frozen, BOTH),
    (P.activating, LOADED),
    (P.active, BOTH),
    (P.active, LOADED),
]
"""The kernel shows what no step of the record did."""
PARTLY_UNDONE = [
    (P.active, IDLE),
    (P.loading, LOADED),
    (P.loaded, ACTIVE),
    (P.loaded, LOADED),
    (P.loaded, IDLE),
    (P.executing, IDLE),
    (P.executing, ACTIVE),
]
"""The kernel shows less than the record."""


@pytest.mark.parametrize(("phase", "kernel"), CONTRADICTIONS)
def test_a_kernel_that_is_elsewhere_in_the_same_boot_is_inconsistent(phase: Phase, kernel: Observed) -> None:
    for policy in ("roll-back", "resume"):
        found = reconcile_record(record(phase), kernel, policy)
        assert (found.phase, found.action) == (P.inconsistent, Action.none)
        assert phase.value in found.reason, "the record by name"
        assert ("inactive" in found.reason) is not kernel.active, "what was found"


@pytest.mark.parametrize(("phase", "kernel"), PARTLY_UNDONE)
def test_what_was_undone_and_not_recorded_leads_to_the_undo_of_the_rest(phase: Phase, kernel: Observed) -> None:
    """khod died in a rollback whose record could not be written: whoever is frozen is frozen all the same."""
    for policy in ("roll-back", "resume"):
        found = reconcile_record(record(phase), kernel, policy)
        assert (found.phase, found.action) == (phase, Action.roll_back)


@pytest.mark.parametrize("phase", [phase for phase in BEGUN if phase is not P.executing])
def test_a_boot_after_a_loss_of_power_is_idle_and_says_what_was_lost(phase: Phase) -> None:
    found = reconcile_record(record(phase, BEFORE), IDLE)
    assert (found.phase, found.action) == (P.idle, Action.none)
    assert phase.value in found.reason


def test_a_host_that_was_rebooted_in_the_middle_has_booted_cold() -> None:
    """khod was stopped, rolled back, and the next one starts in another boot."""
    kept = replace(record(P.idle, BEFORE, done=()), interrupted="a handover was at freezing")
    found = reconcile_record(kept, IDLE)
    assert found.phase is P.cold_boot
    assert "freezing" in found.reason
    assert reconcile_record(replace(kept, boot_id=HERE), IDLE).phase is P.idle, "khod alone was restarted"


@pytest.mark.parametrize("phase", [P.failed, P.rolling_back, P.freezing, P.loading])
def test_whatever_bears_the_mark_is_verified_and_doubted(phase: Phase) -> None:
    """A stale image that could not be unloaded, or a reboot by somebody else while producers were being frozen."""
    found = reconcile_record(record(phase, BEFORE, done=(S.prepare, S.load)), ARRIVED)
    assert (found.phase, found.action) == (P.verifying, Action.verify)
    assert found.doubt


def test_a_jump_by_hand_from_where_all_was_ready_is_not_doubted() -> None:
    assert reconcile_record(record(P.loaded, BEFORE), ARRIVED).doubt == ""
    assert reconcile_record(record(P.executing, BEFORE), ARRIVED).doubt == ""


def test_a_boot_reached_by_a_handover_of_which_no_record_is_left_is_not_idle() -> None:
    found = reconcile_record(None, ARRIVED)
    assert found.phase is P.degraded
    assert RUN in found.reason


@pytest.mark.parametrize("kernel", [IDLE, ACTIVE, BOTH, ARRIVED])
def test_a_record_that_cannot_be_read_is_inconsistent_with_its_own_words(kernel: Observed) -> None:
    found = reconcile_record(RecordError("The record has version 9, this khod knows 1"), kernel)
    assert (found.phase, found.action) == (P.inconsistent, Action.none)
    assert "version 9" in found.reason


# a rollback that failed


@pytest.mark.parametrize(
    ("done", "kernel"),
    [((S.activate,), ACTIVE), ((S.load,), LOADED), ((S.freeze,), IDLE), ((S.prepare,), IDLE), ((S.freeze,), ACTIVE)],
)
def test_what_is_left_of_a_failed_rollback_stands_until_it_is_gone(done: tuple[Step, ...], kernel: Observed) -> None:
    found = reconcile_record(record(P.failed, done=done), kernel)
    assert (found.phase, found.action) == (P.failed, Action.none)


# while khod runs


@pytest.mark.parametrize(
    ("phase", "kernel"), [(phase, kernel) for phase, kernel in CONTRADICTIONS + PARTLY_UNDONE if phase in HELD]
)
def test_a_contradiction_is_shown_when_it_comes_up_later(phase: Phase, kernel: Observed) -> None:
    assert effective_phase(record(phase), kernel) is P.inconsistent


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase in RESTING | HELD])
def test_what_the_kernel_does_not_contradict_is_shown_as_it_is(phase: Phase) -> None:
    assert effective_phase(record(phase), kernel_at(phase)) is phase


def test_force_puts_back_what_the_kernel_shows_and_what_the_record_says() -> None:
    shown_alone = steps_to_undo((), BOTH, told=False)
    assert set(shown_alone) == {S.activate, S.load}
    assert shown_alone.index(S.activate) < shown_alone.index(S.load), "undone in reverse: unload, then 0"
    assert steps_to_undo((S.prepare, S.freeze), LOADED, told=False) == (S.prepare, S.freeze, S.load)
    assert steps_to_undo(BEGUN[P.loaded], IDLE, told=False) == BEGUN[P.loaded]
    assert steps_to_undo((), ACTIVE, told=True) == (S.prepare, S.freeze, S.activate), "who may have been told is told"


def test_counts_of_another_boot_are_dropped_and_the_count_of_handovers_is_not() -> None:
    old = replace(record(P.idle, BEFORE), suspect="an abort", failed_activations=3, handovers=7)
    new = reset_record(old, reconcile_record(old, IDLE), IDLE)
    assert (new.boot_id, new.suspect, new.failed_activations, new.handovers) == (HERE, "", 0, 7)
    same = replace(old, boot_id=HERE)
    new = reset_record(same, reconcile_record(same, IDLE), IDLE)
    assert (new.suspect, new.failed_activations) == ("an abort", 3)


def test_every_step_of_the_machine_is_in_this_file_s_table() -> None:
    assert {row.doing for row in STEPS.values()} | {row.done for row in STEPS.values()} == BEGUN.keys()


@pytest.mark.parametrize("phase", [P.frozen, P.active, P.preparing])
def test_state_that_came_with_somebody_else_s_image_is_verified_and_doubted(phase: Phase) -> None:
    """LUO's sessions go along with any kexec; what the producers had left waits for them."""
    found = reconcile_record(record(phase, BEFORE), replace(ARRIVED, cmdline="root=/dev/sda"))
    assert (found.phase, found.action) == (P.verifying, Action.verify)
    assert found.doubt


# verifying, other boot | no KHO state | cold boot


def test_a_kernel_that_dies_while_it_is_verified_ends_as_a_cold_boot() -> None:
    verifying = record(P.verifying, BEFORE, done=())
    found = reconcile_record(verifying, IDLE)
    assert (found.phase, found.action) == (P.cold_boot, Action.none)
    kept = reset_record(verifying, found, IDLE)
    assert kept.cold_boot is not None
    assert (kept.cold_boot.last_phase, kept.cold_boot.boot_id) == (P.verifying, BEFORE)


@pytest.mark.parametrize(
    ("kept", "kernel"),
    [
        (replace(record(P.verifying, BEFORE, done=()), interrupted="shut down"), IDLE),
        (record(P.verifying, BEFORE, done=()), ARRIVED),
    ],
    ids=["a shutdown", "a jump"],
)
def test_a_verification_that_was_left_in_order_is_no_cold_boot(kept: Record, kernel: Observed) -> None:
    found = reconcile_record(kept, kernel)
    assert (found.phase, found.action) == (P.idle, Action.none)
    assert reset_record(kept, found, kernel).cold_boot is None


def test_the_explanation_of_a_cold_boot_lasts_as_long_as_the_boot() -> None:
    cold = reset_record(record(P.executing, BEFORE), reconcile_record(record(P.executing, BEFORE), IDLE), IDLE)
    assert reset_record(cold, reconcile_record(cold, IDLE), IDLE).cold_boot == cold.cold_boot
    later = replace(IDLE, boot_id="another")
    assert reset_record(cold, reconcile_record(cold, later), later).cold_boot is None
