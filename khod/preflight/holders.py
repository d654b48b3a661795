"""Checks of those who hold state: they are here, and none has something left from the last time."""

from khod.model import Order, SessionFate
from khod.preflight.facts import Facts, Finding
from khod.producers.barrier import ranks
from khod.producers.identity import process_of
from khod.producers.registrations import Registered
from khod.session_holders import title
from khod.text import join_names
from khod.verify import producers as present
from khod.verify import without

MAX_NAMES_SHOWN = 20


def producers(facts: Facts) -> Finding:
    """Every producer that must take part is here, and their order can be told."""
    names = [producer.name for rank in ranks(facts.producers()) for producer in rank]
    if missing := sorted(set(facts.config.producers.require) - set(names)):
        return Finding.fail(
            f"Required and not here: {join_names(missing, MAX_NAMES_SHOWN)}",
            "Start what registers under these names; producers.require asks for them.",
        )
    if facts.absent:
        absent = [f"{found.name} (process {found.process.pid}, {_fate(found)})" for found in facts.absent]
        gone = join_names(absent, MAX_NAMES_SHOWN)
        return Finding.fail(
            f"Registered before khod was restarted and not back: {gone}; a handover now would go without their state",
            "Wait until they connect again, start them, or give them up with: khoctl producers forget NAME",
        )
    return Finding.passed(f"{len(names)}: {join_names(names, MAX_NAMES_SHOWN) or 'none'}")


def _fate(registered: Registered) -> str:
    alive = process_of(registered.process.pid) == registered.process
    return "alive and not connected" if alive else "ended while khod was down"


def kernel_producers(facts: Facts) -> Finding | None:
    """The required producers in the kernel, where the tree can be read without entering the active phase."""
    kernel, required = facts.probed.kernel, set(facts.config.producers.require_kernel)
    if not required or kernel is None or kernel.order is not Order.load_first:
        return None
    if facts.outgoing is None:
        return Finding.skipped("The kernel's tree cannot be read now")
    if missing := sorted(required - present(facts.outgoing, kernel.generation).keys()):
        error = without(missing)
        return Finding.fail(error.what, error.remedy)
    return Finding.passed(f"In the tree: {', '.join(sorted(required))}")


def claims(facts: Facts) -> Finding | None:
    """Nothing that was left before the last jump waits to be taken back."""
    if facts.record.claims:
        names = join_names((holder.name for holder in facts.record.claims), MAX_NAMES_SHOWN)
        return Finding.fail(
            f"Left before the last jump and not taken back yet: {names}; a handover would go without them and lose it",
            "Start these producers, or give their state up with: khoctl producers forget NAME",
        )
    if facts.unknown_sessions:
        names = join_names(facts.unknown_sessions, MAX_NAMES_SHOWN)
        return Finding.fail(
            f"LUO sessions of which no record says whose they are: {names}; they hold memory that came from the "
            "previous kernel, and another jump would lose it",
            "Find out whose they are; to free one: khoctl producers forget SESSION",
        )
    return None


def sessions(facts: Facts) -> Finding | None:
    """The jump ends no LUO session that no producer registered."""
    found = facts.sighted.sessions
    by_fate = {
        fate: join_names(
            (f"{title(one)}, held by {one.holder}: {one.why}" for one in found if one.fate is fate), MAX_NAMES_SHOWN
        )
        for fate in SessionFate
    }
    if found and facts.now:
        names = join_names((f"{title(one)}, held by {one.holder}" for one in found), MAX_NAMES_SHOWN)
        return Finding.passed(f"An immediate jump keeps the LUO sessions that no producer registered: {names}")
    if lost := by_fate[SessionFate.lost]:
        return Finding.fail(
            f"An orderly shutdown would end LUO sessions that no producer registered, and their state be lost: {lost}",
            "Jump with --now, which stops nothing; or let their owner put them into a file descriptor store that "
            "outlives its unit (FileDescriptorStoreMax=, FileDescriptorStorePreserve=yes), or close them.",
        )
    if unknown := by_fate[SessionFate.unknown]:
        return Finding.warn(
            f"An orderly shutdown may end LUO sessions that no producer registered: {unknown}",
            "Jump with --now, which stops nothing; or ask their owner.",
        )
    if facts.sighted.unseen and not facts.now:
        return Finding.warn(
            f"An orderly shutdown may end LUO sessions that no producer registered: {facts.sighted.unseen}",
            "Give khod its capabilities back (systemctl cat kho-handover), or jump with --now, which stops nothing.",
        )
    if kept := by_fate[SessionFate.kept]:
        return Finding.passed(f"LUO sessions that no producer registered outlive an orderly shutdown: {kept}")
    return None
