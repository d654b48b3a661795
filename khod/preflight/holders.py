# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the holders of state: they are present, and none has state left from the last handover."""

from collections.abc import Iterable

from khod.errors import ConfigError, KhoError
from khod.handover.verify import missing_state_error
from khod.kernel.traits import kernel_producers as present
from khod.model import LuoSession, Order, SessionFate
from khod.preflight.facts import CheckFinding, Facts
from khod.producers.barrier import Participant
from khod.producers.hooks import Hook
from khod.producers.identity import is_alive
from khod.producers.kept import KeptVm
from khod.producers.order import order_in_ranks
from khod.producers.registrations import RegisteredProducer
from khod.producers.session_holders import session_title
from khod.text import join_names


def check_producers(facts: Facts) -> CheckFinding:
    """Every required producer is present, and the producers can be ordered."""
    everyone = [producer for rank in order_in_ranks(facts.producers()) for producer in rank]
    names = [producer.name for producer in everyone]
    if missing := sorted(set(facts.config.producers.require) - set(names)):
        return CheckFinding.fail_with(
            f"Required and not here: {join_names(missing)}",
            "Start what registers under these names; producers.require asks for them.",
        )
    if facts.absent:
        absent = [f"{found.name} (process {found.process.pid}, {_absence_reason(found)})" for found in facts.absent]
        gone = join_names(absent)
        return CheckFinding.fail_with(
            f"Registered before khod was restarted and not back: {gone}; a handover now would go without their state",
            "Wait until they connect again, start them, or give them up with: khoctl producers forget NAME",
        )
    if unattended := [producer for producer in everyone if isinstance(producer, KeptVm)]:
        return CheckFinding.fail_with(
            f"VMs to be kept whose khod-vm is not there: {join_names(vm.name for vm in unattended)}",
            "khod has them started when it starts, and before a handover. Look why they are not there: "
            f"systemctl status {' '.join(vm.unit for vm in unattended)}",
        )
    if unstartable := _unstartable_commands(everyone):
        return CheckFinding.fail_with(
            f"Commands that cannot be started: {join_names(unstartable)}",
            "Correct them in /etc/kho/producers.d, or install what they name.",
        )
    return CheckFinding.pass_with(f"{len(names)}: {join_names(names)}" if names else "No producers")


def _unstartable_commands(producers: Iterable[Participant]) -> list[str]:
    return [text for producer in producers if isinstance(producer, Hook) for text in producer.unstartable_commands()]


def _absence_reason(registered: RegisteredProducer) -> str:
    alive = is_alive(registered.process)
    return "alive and not connected" if alive else "ended while khod was down"


def kernel_producers(facts: Facts) -> CheckFinding | None:
    """Check the required producers in the kernel, if the tree can be read without entering the active phase."""
    kernel, required = facts.probed.kernel, set(facts.config.producers.require_kernel)
    if not required or kernel is None or kernel.order is not Order.load_first:
        return None
    if facts.outgoing is None:
        return CheckFinding.skip_with("The kernel's tree cannot be read now")
    if missing := sorted(required - present(facts.outgoing, kernel.generation).keys()):
        error = missing_state_error(missing)
        return CheckFinding.fail_with(error.what, error.remedy)
    return CheckFinding.pass_with(f"In the tree: {', '.join(sorted(required))}")


def check_health(facts: Facts) -> CheckFinding | None:
    """Every health check of verify.d can be run after the jump; None without any."""
    try:
        checks = facts.health()
    except ConfigError as error:
        return CheckFinding.fail_with(error.what, error.remedy)
    if not checks:
        return None
    if wrong := [check.wrong for check in checks if check.wrong is not None]:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        where = f"{wrong[0].where}: " if wrong[0].where else ""
        return CheckFinding.fail_with(f"{where}{wrong[0].what}{more}", wrong[0].remedy)
    unstartable = [check for check in checks if check.unstartable]
    text = (
        f"Health checks that cannot be started: {join_names(f'{one.unstartable} ({one.name})' for one in unstartable)}"
    )
    remedy = "Correct them in /etc/kho/verify.d, or install what they name."
    if any(check.is_required for check in unstartable):
        return CheckFinding.fail_with(text, remedy)
    if unstartable:
        return CheckFinding.warn_with(text, remedy)
    return CheckFinding.pass_with(f"{len(checks)}: {join_names(check.name for check in checks)}")


def check_claims(facts: Facts) -> CheckFinding | None:
    """No producer has state from before the last jump that it has not taken back."""
    if facts.record.claims:
        names = join_names(holder.name for holder in facts.record.claims)
        return CheckFinding.fail_with(
            f"Left before the last jump and not taken back yet: {names}; a handover would go without them and lose it",
            "Start these producers, or repair them, then: khoctl producers retry NAME. To give the state up: "
            "khoctl producers forget NAME",
        )
    if facts.unknown_sessions:
        names = join_names(facts.unknown_sessions)
        return CheckFinding.fail_with(
            f"LUO sessions of which no record says whose they are: {names}; they hold memory that came from the "
            "previous kernel, and another jump would lose it",
            "Find out whose they are; to free one: khoctl producers forget SESSION",
        )
    return None


def check_quiesce(facts: Facts) -> CheckFinding | None:
    """The rest of the host can be stopped before the producers are frozen, and started again."""
    survey = facts.survey
    if survey is None:
        return None
    if isinstance(survey, KhoError):
        return CheckFinding.from_error(survey)
    try:
        survey.require_clear()
    except KhoError as error:
        return CheckFinding.from_error(error)
    selection = survey.selection
    count = len(selection.stopped)
    evidence = f"{count} unit{'' if count == 1 else 's'} can be stopped and started again, {len(selection.kept)} stay"
    if survey.stores:
        return CheckFinding.warn_with(
            f"{evidence}; then `systemctl kexec`, without a way back: only that hands over the files that these units "
            f"have in their descriptor stores: {join_names(survey.stores)}",
            "Register them as producers, or stop them before.",
        )
    return CheckFinding.pass_with(evidence)


def check_sessions(facts: Facts) -> CheckFinding | None:
    """The jump ends no LUO session that no producer registered."""
    outgoing = [one for one in facts.sighted.sessions if not one.incoming]
    ended = [] if facts.now else [one for one in outgoing if one.fate is SessionFate.lost]
    doubtful = [] if facts.now else [one for one in outgoing if one.fate is SessionFate.unknown]
    if ended:
        return CheckFinding.fail_with(
            "An orderly shutdown would end LUO sessions that no producer registered, and their state be lost: "
            f"{_list_sessions(ended)}",
            "Jump with `now`, which stops nothing; or let their owner put them into a file descriptor store that "
            "outlives its unit (FileDescriptorStoreMax=, FileDescriptorStorePreserve=yes), or close them.",
        )
    if doubtful or (facts.sighted.unseen and not facts.now):
        return CheckFinding.warn_with(
            "An orderly shutdown may end LUO sessions that no producer registered: "
            f"{_list_sessions(doubtful) or facts.sighted.unseen}",
            "Jump with `now`, which stops nothing; or ask their owner.",
        )
    if came := [one for one in facts.sighted.sessions if one.incoming]:
        return CheckFinding.warn_with(
            f"LUO sessions are open that no jump takes any further, with what is left in them: {_list_sessions(came)}",
            "Let their owner take the files out, finish the session and hand them over in a new one.",
        )
    if outgoing and facts.now:
        return CheckFinding.pass_with(
            f"A jump at once keeps LUO sessions that no producer registered: {_list_sessions(outgoing, why=False)}"
        )
    if outgoing:
        return CheckFinding.pass_with(f"LUO sessions that no producer registered are kept: {_list_sessions(outgoing)}")
    return None


def _list_sessions(sessions: Iterable[LuoSession], *, why: bool = True) -> str:
    """List sessions with their holders, and why a shutdown keeps or ends each."""
    return join_names(f"{session_title(one)}, held by {one.holder}{f': {one.why}' if why else ''}" for one in sessions)
