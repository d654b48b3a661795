# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a handover would do, step by step, each with its undo. Nothing is changed to find out."""

from collections.abc import Sequence

from khod.config import Deadlines
from khod.handover.machine import STEPS, Machine, remaining_steps
from khod.kernel.protocol import KhoKernel
from khod.model import Planned, Step
from khod.producers.barrier import Participant
from khod.producers.order import LEADERS, order_in_ranks
from khod.quiesce.host import Survey
from khod.target.target import Request, Target
from khod.text import format_size, join_names, printable

NOBODY = "no producers: nothing to do"
UNDO_NOW = "if reboot(2) fails: all steps above are undone"
UNDO_ORDERLY = (
    "everything above, as long as systemd has not begun; then none: where reboot(2) fails, systemd goes on to an "
    "ordinary reboot, a cold boot in which nothing arrives"
)
"""systemd-shutdown ends in reboot(RB_AUTOBOOT) even if the kexec failed (src/shutdown/shutdown.c, seen in 262)."""


def plan_steps(
    machine: Machine,
    kernel: KhoKernel,
    producers: Sequence[Participant],
    deadlines: Deadlines,
    request: Request,
    target: Target | None,
    survey: Survey | None = None,
) -> list[Planned]:
    """Return the steps that are left, in this kernel's order; ConfigError if the producers' order is a cycle.

    `survey` is what the step quiesce would stop, None without that step.
    """
    last = Step.load if request.load_only else Step.execute
    others = [producer for producer in producers if producer.name not in LEADERS]
    lock = "".join(
        f"get the lock ({producer.name}), {producer.timeout:g} s at most; then "
        for producer in producers
        if producer.name in LEADERS
    )
    told = _describe_producers(others)
    by_khod = request.now or (survey is not None and not survey.stores)
    does = {
        Step.prepare: lock
        + (f"tell {told} to prepare, {deadlines.prepare:g} s at most: work goes on" if others else NOBODY),
        Step.quiesce: _describe_quiesce(survey),
        Step.freeze: f"tell {told} to freeze, {deadlines.freeze:g} s at most: the blackout begins"
        if others
        else NOBODY,
        Step.activate: f"{kernel.entering}; keep a snapshot of the state tree",
        Step.load: f"kexec_file_load: {_describe_target(target)}",
        Step.execute: "sync all disks, freeze the local file systems, then reboot(LINUX_REBOOT_CMD_KEXEC): the point "
        "of no return"
        if by_khod
        else "systemctl kexec: the point of no return; an orderly shutdown, then the jump",
    }
    undo = {step: row.undo for step, row in STEPS.items()} | {
        Step.activate: kernel.leaving,
        Step.execute: UNDO_NOW if by_khod else UNDO_ORDERLY,
    }
    left = remaining_steps(machine, kernel.order, last, quiesces=survey is not None)
    steps = [Planned(step.value, does[step], undo[step]) for step in left]
    if not request.load_only:
        after = (
            "in the next kernel: compare what arrived with the snapshot, give the producers back what they handed over"
        )
        steps.append(Planned("verify", after, "no undo; missing state is reported (exit code 7)"))
    return steps


def _describe_producers(producers: Sequence[Participant]) -> str:
    words = []
    for rank in order_in_ranks(list(producers)):
        words.append(join_names(producer.name for producer in rank))
    return ", then ".join(words)


def _describe_quiesce(survey: Survey | None) -> str:
    if survey is None or not survey.selection.stopped:
        return "no unit is to be stopped"
    stopped = survey.selection.stopped
    return f"stop the rest of the host, {len(stopped)} units: {join_names(stopped, len(stopped))}"


def _describe_target(target: Target | None) -> str:
    if target is None:
        return "the image you give with `kernel`"
    about = target.apart.about if target.apart else None
    formats = f" ({', '.join(target.apart.formats)}{f' {about.version}' if about else ''})" if target.apart else ""
    initrd = f", initrd {target.initrd.name} ({format_size(target.initrd.size)})" if target.initrd else ", no initrd"
    return printable(f"{target.kernel.name}{formats}{initrd}")
