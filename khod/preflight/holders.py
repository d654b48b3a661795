"""Checks of those who hold state: they are here, and none has something left from the last time."""

from khod.machine import RESTING
from khod.model import Order
from khod.preflight.facts import Facts, Finding
from khod.producers.barrier import ranks
from khod.verify import producers as present
from khod.verify import without

SHOWN = 20


def producers(facts: Facts) -> Finding:
    """Every producer that must take part is here, and their order can be told."""
    names = [producer.name for rank in ranks(facts.producers()) for producer in rank]
    if missing := sorted(set(facts.config.producers.require) - set(names)):
        return Finding.fail(
            f"Required and not here: {', '.join(missing)}",
            "Start what registers under these names; producers.require asks for them.",
        )
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return Finding.passed(f"{len(names)}: {shown or 'none'}")


def kernel_producers(facts: Facts) -> Finding | None:
    """The required producers in the kernel, where the tree can be read without entering the active phase."""
    kernel, required = facts.probed.kernel, set(facts.config.producers.require_kernel)
    if not required or kernel is None or kernel.order is not Order.load_first:
        return None
    if missing := sorted(required - present(kernel.tree(), kernel.generation).keys()):
        error = without(missing)
        return Finding.fail(error.what, error.remedy)
    return Finding.passed(f"In the tree: {', '.join(sorted(required))}")


def claims(facts: Facts) -> Finding | None:
    """Nothing that was left before the last jump waits to be taken back."""
    if not facts.record.producers or facts.record.phase not in RESTING:
        return None
    names = ", ".join(holder.name for holder in facts.record.producers)
    return Finding.fail(
        f"Left before the last jump and not taken back yet: {names}; another jump would lose it",
        "Start these producers, or give their state up with: khoctl producers forget NAME",
    )
