# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handover machine: without side effects, and documented by its tables.

`STEPS` has the phase during a step, the phase after it, and its undo; `ORDERS` has the order of steps that the kernel
requires; `TRANSITIONS` has the phases that may follow each phase. A test compares the table in khod(8) with
`draw_machine()`. The point of no return is execute: every other step has its undo beside it, and even execute may fail
with an errno.
"""

from dataclasses import replace

from khod.dataclass import dataclass
from khod.model import Order, Phase, Step


@dataclass(frozen=True)
class Row:
    """One step: the phase during it, the phase after it, and what its undo does."""

    doing: Phase
    done: Phase
    undo: str


STEPS = {
    Step.prepare: Row(Phase.preparing, Phase.prepared, "tell every prepared producer `cancel`, in reverse order"),
    Step.quiesce: Row(Phase.quiescing, Phase.quiesced, "start again what was stopped"),
    Step.freeze: Row(Phase.freezing, Phase.frozen, "tell every frozen producer `thaw`, in reverse order"),
    Step.activate: Row(Phase.activating, Phase.active, "leave the kernel's active phase"),
    Step.load: Row(Phase.loading, Phase.loaded, "KEXEC_FILE_UNLOAD"),
    Step.execute: Row(Phase.executing, Phase.executing, "nothing of its own: the jump came back with an errno"),
}

# A rollback undoes the steps in reverse. If loading copies the tree into the image (v3, 6.18), the image is therefore
# unloaded before the active phase is left: an image left loaded would hand over a stale tree.
ORDERS = {
    Order.activate_first: (Step.prepare, Step.quiesce, Step.freeze, Step.activate, Step.load, Step.execute),
    Order.load_first: (Step.prepare, Step.load, Step.quiesce, Step.freeze, Step.activate, Step.execute),
}

P = Phase
TRANSITIONS: dict[Phase, tuple[Phase, ...]] = {
    P.idle: (P.preparing,),
    P.preparing: (P.prepared, P.rolling_back),
    P.prepared: (P.quiescing, P.freezing, P.loading, P.rolling_back),
    P.quiescing: (P.quiesced, P.rolling_back),
    P.quiesced: (P.freezing, P.rolling_back),
    P.freezing: (P.frozen, P.rolling_back),
    P.frozen: (P.activating, P.rolling_back),
    P.activating: (P.active, P.rolling_back),
    P.active: (P.loading, P.executing, P.rolling_back),
    P.loading: (P.loaded, P.rolling_back),
    P.loaded: (P.quiescing, P.freezing, P.executing, P.rolling_back),
    P.executing: (P.rolling_back, P.verifying, P.cold_boot),
    P.rolling_back: (P.idle, P.verified, P.degraded, P.cold_boot, P.failed),
    P.verifying: (P.verified, P.degraded, P.cold_boot),
    P.verified: (P.preparing,),
    P.degraded: (P.preparing, P.verified),
    P.cold_boot: (P.preparing,),
    P.failed: (P.rolling_back,),
    P.foreign: (P.rolling_back,),
    P.inconsistent: (P.rolling_back,),
}

STARTS = (P.idle, P.foreign, P.inconsistent)
"""The phases in which khod may start if no handover of its own was under way."""

RESTING = frozenset({P.idle, P.verified, P.degraded, P.cold_boot})
"""Phases in which a new handover may begin: khod holds nothing."""

HELD = frozenset({P.prepared, P.quiesced, P.frozen, P.active, P.loaded})
"""Phases in which a handover may wait, for an operator or after a restart of khod."""


class IllegalTransition(AssertionError):
    """A transition that the table does not have was requested: a bug, never a state of the host."""


@dataclass(frozen=True)
class Machine:
    """The phase of a handover, and the steps whose undo is due, in the order in which they were done."""

    phase: Phase = Phase.idle
    done: tuple[Step, ...] = ()

    def enter_phase(self, phase: Phase) -> "Machine":
        """Enter `phase`; raise IllegalTransition if the table has no such transition."""
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"{self.phase.value} -> {phase.value}")
        return replace(self, phase=phase)

    def begin_step(self, step: Step) -> "Machine":
        """Enter the phase of a step; its undo is due from then on, because the step may have half of its effect."""
        return replace(self.enter_phase(STEPS[step].doing), done=(*self.done, step))

    def finish_step(self, step: Step) -> "Machine":
        """Enter the phase after a step that is done."""
        return self if STEPS[step].doing is STEPS[step].done else self.enter_phase(STEPS[step].done)

    def strike_step(self, step: Step) -> "Machine":
        """Remove a step from those whose undo is due."""
        return replace(self, done=tuple(kept for kept in self.done if kept is not step))


def remaining_steps(machine: Machine, order: Order, last: Step, *, quiesces: bool = False) -> tuple[Step, ...]:
    """Return the steps still to be done, up to `last`; quiesce only with `quiesces`.

    If `last` is activate, load is left out even if it would come first: `khoctl activate` names no image.
    """
    steps = ORDERS[order][: ORDERS[order].index(last) + 1]
    left_out = {Step.quiesce} if not quiesces else set()
    if last is Step.activate:
        left_out.add(Step.load)
    return tuple(step for step in steps if step not in machine.done and step not in left_out)


def draw_machine() -> str:
    """Return the table as a Mermaid diagram, one transition on each line."""
    arrows = (f"    {here.value} --> {there.value}" for here, row in TRANSITIONS.items() for there in row)
    starts = (f"    [*] --> {phase.value}" for phase in STARTS)
    return "\n".join(["stateDiagram-v2", *starts, *arrows])
