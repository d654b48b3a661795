# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine's tables against the design, and the table in khod(8) against them."""

import re

import pytest

from khod.handover import machine
from khod.handover.machine import HELD, ORDERS, RESTING, STEPS, TRANSITIONS, IllegalTransition, Machine
from khod.model import Order, Phase, Step
from tests.unit.khods import REPOSITORY

P, S = Phase, Step
ARROW = re.compile(r"^\s*(\[\*\]|\w+) --> (\w+)\s*$", re.MULTILINE)


def test_every_step_has_its_undo_beside_it() -> None:
    assert STEPS.keys() == set(Step)
    assert all(row.undo for row in STEPS.values())
    words = {S.prepare: "cancel", S.quiesce: "start", S.freeze: "thaw", S.activate: "leave", S.load: "UNLOAD"}
    for step, word in words.items():
        assert word in STEPS[step].undo
    assert STEPS[S.execute].undo.startswith("nothing"), "the point of no return, and the only one"


def test_each_step_enters_and_ends_in_the_phases_of_the_design() -> None:
    assert {step: (row.doing, row.done) for step, row in STEPS.items()} == {
        S.prepare: (P.preparing, P.prepared),
        S.quiesce: (P.quiescing, P.quiesced),
        S.freeze: (P.freezing, P.frozen),
        S.activate: (P.activating, P.active),
        S.load: (P.loading, P.loaded),
        S.execute: (P.executing, P.executing),
    }


def test_the_orders_hold_every_step_and_end_with_the_point_of_no_return() -> None:
    for order in ORDERS.values():
        assert sorted(order, key=str) == sorted(Step, key=str)
        assert order[-1] is S.execute
        assert order.index(S.prepare) < order.index(S.quiesce) < order.index(S.freeze) < order.index(S.activate)


def test_activate_first_puts_the_unload_before_the_write_of_0() -> None:
    undone = list(reversed(ORDERS[Order.activate_first]))
    assert undone.index(S.load) < undone.index(S.activate)


def test_load_first_has_nothing_but_the_jump_in_the_blackout() -> None:
    order = ORDERS[Order.load_first]
    assert order.index(S.load) < order.index(S.freeze)


@pytest.mark.parametrize("order", list(Order))
def test_a_handover_goes_the_whole_way_in_either_order(order: Order) -> None:
    here = Machine()
    for step in ORDERS[order]:
        here = here.begin_step(step)
        assert here.phase is STEPS[step].doing
        assert here.done[-1] is step, "its undo is due from the moment it begins"
        here = here.finish_step(step)
        assert here.phase is STEPS[step].done
    assert here.done == ORDERS[order]


@pytest.mark.parametrize("order", list(Order))
def test_from_every_phase_on_the_way_there_is_a_way_back(order: Order) -> None:
    here = Machine()
    for step in ORDERS[order]:
        here = here.begin_step(step)
        assert here.enter_phase(P.rolling_back).phase is P.rolling_back
        here = here.finish_step(step)
        assert here.enter_phase(P.rolling_back).phase is P.rolling_back


def test_a_rollback_ends_at_rest_or_failed_and_failed_may_be_tried_again() -> None:
    """At rest is what this boot's handover came to: a rollback of another one changes nothing of it."""
    assert set(TRANSITIONS[P.rolling_back]) == {*RESTING, P.failed}
    assert P.rolling_back in TRANSITIONS[P.failed]


def test_only_executing_leads_out_of_this_kernel() -> None:
    """The transitions without a way back: the jump, and the end of the kernel that it led to."""
    after = {P.verifying, P.cold_boot}
    assert {here for here, row in TRANSITIONS.items() if after & set(row)} == {
        P.executing,
        P.verifying,
        P.rolling_back,
    }
    assert P.verifying not in TRANSITIONS[P.rolling_back], "it goes back to what this boot came to, and no further"


def test_every_phase_is_in_the_table_and_leads_somewhere() -> None:
    assert TRANSITIONS.keys() == set(Phase)
    assert all(TRANSITIONS.values())


def test_every_phase_is_reached_from_the_start() -> None:
    """By the drawing alone, as its reader has to."""
    arrows = ARROW.findall(machine.draw_machine())
    reached, ahead = set(), {"[*]"}
    while ahead:
        reached |= ahead
        ahead = {there for here, there in arrows if here in reached} - reached
    assert reached == {"[*]", *(phase.value for phase in Phase)}


def test_a_handover_begins_where_nothing_is_held_and_waits_where_something_is_done() -> None:
    assert {P.idle, P.verified, P.degraded, P.cold_boot} == RESTING
    assert {row.done for step, row in STEPS.items() if step is not S.execute} == HELD
    assert {phase for phase in Phase if P.preparing in TRANSITIONS[phase]} == RESTING
    assert not RESTING & HELD


@pytest.mark.parametrize("here", list(Phase))
def test_what_the_table_does_not_have_is_refused(here: Phase) -> None:
    for there in set(Phase) - set(TRANSITIONS[here]):
        with pytest.raises(IllegalTransition):
            Machine(here).enter_phase(there)


@pytest.mark.parametrize(("here", "there"), [(P.idle, P.active), (P.idle, P.executing), (P.frozen, P.executing)])
def test_no_step_may_be_left_out(here: Phase, there: Phase) -> None:
    with pytest.raises(IllegalTransition):
        Machine(here).enter_phase(there)


def test_undone_strikes_one_step_and_keeps_the_order_of_the_others() -> None:
    here = Machine(P.rolling_back, (S.prepare, S.freeze, S.activate, S.load))
    assert here.strike_step(S.activate).done == (S.prepare, S.freeze, S.load)


LEFT = [
    (Order.activate_first, (), S.activate, (S.prepare, S.freeze, S.activate)),
    (Order.activate_first, (), S.execute, (S.prepare, S.freeze, S.activate, S.load, S.execute)),
    (Order.activate_first, (S.prepare, S.freeze, S.activate), S.load, (S.load,)),
    (Order.activate_first, (S.prepare, S.freeze, S.activate), S.activate, ()),
    (Order.activate_first, (S.prepare, S.freeze, S.activate, S.load), S.execute, (S.execute,)),
    (Order.load_first, (), S.activate, (S.prepare, S.freeze, S.activate)),
    (Order.load_first, (), S.load, (S.prepare, S.load)),
    (Order.load_first, (S.prepare, S.load), S.execute, (S.freeze, S.activate, S.execute)),
    (Order.load_first, (S.prepare, S.freeze, S.activate), S.execute, (S.load, S.execute)),
    (Order.load_first, (S.prepare, S.load), S.activate, (S.freeze, S.activate)),
]


@pytest.mark.parametrize(("order", "done", "last", "steps"), LEFT)
def test_what_is_left_from_wherever_it_stands(
    order: Order, done: tuple[Step, ...], last: Step, steps: tuple[Step, ...]
) -> None:
    phase = STEPS[done[-1]].done if done else P.idle
    assert machine.remaining_steps(Machine(phase, done), order, last) == steps
    here = Machine(phase, done)
    for step in steps:
        here = here.begin_step(step).finish_step(step)


def test_the_drawing_shows_every_arrow_of_the_table_and_no_other() -> None:
    drawn = {arrow for arrow in ARROW.findall(machine.draw_machine()) if arrow[0] != "[*]"}
    assert drawn == {(here.value, there.value) for here, row in TRANSITIONS.items() for there in row}
    assert machine.draw_machine().startswith("stateDiagram-v2\n")


def test_the_table_in_the_manual_page_is_the_drawing() -> None:
    page = (REPOSITORY / "packaging/man/khod.8").read_text()
    table = page.partition("\n.SS Phases\n")[2].partition("\n.TE\n")[0].partition("\nPhase|Next phase\n")[2]
    rows = [line.split("|") for line in table.splitlines()]
    arrows = [f"    {here} --> {there}" for here, row in rows for there in row.split(", ")]
    assert "\n".join(["stateDiagram-v2", *arrows]) == machine.draw_machine()
