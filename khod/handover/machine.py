# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handover machine: pure, and its tables are the documentation.

`STEPS` says which phase a step passes through, where it ends and what its undo is; `ORDERS` in which
order the kernel wants them; `TRANSITIONS` what may follow what. The table in khod(8) is held to
`draw_machine()` by a test. The point of no return is execute: every other step has
its undo beside it, and even execute may come back with an errno.
"""

from dataclasses import dataclass, replace

from khod.model import Order, Phase, Step


@dataclass(frozen=True)
class Row:
    """One step: the phase while it runs, the phase after it, and what its undo does."""

    doing: Phase
    done: Phase
    undo: str


STEPS = {
    Step.prepare: Row(Phase.preparing, Phase.prepared, "tell every prepared producer `cancel`, in reverse order"),
    Step.freeze: Row(Phase.freezing, Phase.frozen, "tell every frozen producer `thaw`, in reverse order"),
    Step.activate: Row(Phase.activating, Phase.active, "leave the kernel's active phase"),
    Step.load: Row(Phase.loading, Phase.loaded, "KEXEC_FILE_UNLOAD"),
    Step.execute: Row(Phase.executing, Phase.executing, "nothing of its own: the jump came back with an errno"),
}

# A rollback takes the steps done in reverse. Where the image copies the tree at load (v3, 6.18), that
# unloads before it leaves the active phase: an image left loaded would hand a stale tree over.
ORDERS = {
    Order.activate_first: (Step.prepare, Step.freeze, Step.activate, Step.load, Step.execute),
    Order.load_first: (Step.prepare, Step.load, Step.freeze, Step.activate, Step.execute),
}

P = Phase
TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    P.idle: (P.preparing,),
    P.preparing: (P.prepared, P.rolling_back),
    P.prepared: (P.freezing, P.loading, P.rolling_back),
    P.freezing: (P.frozen, P.rolling_back),
    P.frozen: (P.activating, P.rolling_back),
    P.activating: (P.active, P.rolling_back),
    P.active: (P.loading, P.executing, P.rolling_back),
    P.loading: (P.loaded, P.rolling_back),
    P.loaded: (P.freezing, P.executing, P.rolling_back),
    P.executing: (P.rolling_back, P.verifying, P.cold_boot),
    P.rolling_back: (P.idle, P.verified, P.degraded, P.cold_boot, P.failed),
    P.verifying: (P.verified, P.degraded),
    P.verified: (P.preparing,),
    P.degraded: (P.preparing, P.verified),
    P.cold_boot: (P.preparing,),
    P.failed: (P.rolling_back,),
    P.foreign: (P.rolling_back,),
    P.inconsistent: (P.rolling_back,),
}

STARTS = (P.idle, P.foreign, P.inconsistent)
"""What a start of khod may find where no handover of its own was under way."""

RESTING = frozenset({P.idle, P.verified, P.degraded, P.cold_boot})
"""Phases a new handover may begin in: nothing of khod's is held anywhere."""

HELD = frozenset({P.prepared, P.frozen, P.active, P.loaded})
"""Phases a handover may wait in, for an operator or after a restart of khod."""


class IllegalTransition(AssertionError):
    """The program asked for a transition the table does not have: a bug, never a state of the host."""


@dataclass(frozen=True)
class Machine:
    """Where a handover stands, and the steps whose undo is due, in the order they were done."""

    phase: Phase = Phase.idle
    done: tuple[Step, ...] = ()

    def enter_phase(self, phase: Phase) -> "Machine":
        """Go to `phase`; IllegalTransition where the table has no such arrow."""
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"{self.phase.value} -> {phase.value}")
        return replace(self, phase=phase)

    def begin_step(self, step: Step) -> "Machine":
        """Enter a step. Its undo is due from here on: it may have had half of its effect."""
        return replace(self.enter_phase(STEPS[step].doing), done=(*self.done, step))

    def finish_step(self, step: Step) -> "Machine":
        """Leave a step behind, done."""
        return self if STEPS[step].doing is STEPS[step].done else self.enter_phase(STEPS[step].done)

    def strike_step(self, step: Step) -> "Machine":
        """Strike a step from what is still to be put back."""
        return replace(self, done=tuple(kept for kept in self.done if kept is not step))


def remaining_steps(machine: Machine, order: Order, last: Step) -> tuple[Step, ...]:
    """The steps still to be done, up to `last`.

    Up to activate, load is left out even where it would come first: `khoctl activate` names no image.
    """
    steps = ORDERS[order][: ORDERS[order].index(last) + 1]
    return tuple(
        step for step in steps if step not in machine.done and not (last is Step.activate and step is Step.load)
    )


def draw_machine() -> str:
    """Draw the table, an arrow a line, in Mermaid's notation."""
    arrows = (f"    {here.value} --> {there.value}" for here, row in TRANSITIONS.items() for there in row)
    starts = (f"    [*] --> {phase.value}" for phase in STARTS)
    return "\n".join(["stateDiagram-v2", *starts, *arrows])
