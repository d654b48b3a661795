"""What must hold before the kernel is touched: named checks, each with its evidence and a remedy.

`khoctl check` shows them all; a handover is refused by the first that fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from khod.config import Config
from khod.errors import ConfigError, KhoError, RecordError, Refused, Unsupported, errno_text
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT, Kexec
from khod.kernel.probe import Probed
from khod.machine import RESTING
from khod.model import Check, CheckResult, Observed, Order, Region
from khod.producers.barrier import Producer, ranks
from khod.reconcile import said
from khod.record import RESERVE, Record, Store
from khod.verify import producers as present
from khod.verify import without

SHOWN = 20
UNDOABLE_LOAD = 2  # calls: one to load, one to unload


@dataclass(frozen=True)
class Facts:
    """What the checks look at; gathered in the kernel's thread."""

    probed: Probed
    kexec: Kexec
    observed: Observed
    store: Store
    config: Config
    record: Record
    foreign: bool
    producers: Callable[[], list[Producer]]


def run(facts: Facts) -> list[Check]:
    """Run every check; raises nothing, what cannot be read is a finding."""
    return [check for function in CHECKS for check in _safely(function, facts)]


def require(checks: list[Check]) -> None:
    """Raise what the first failed check amounts to: Unsupported or Refused."""
    for check in checks:
        if check.result is CheckResult.unsupported:
            raise Unsupported(check.evidence, where=check.name, remedy=check.remedy)
        if check.result is CheckResult.fail:
            raise Refused(check.evidence, where=f"check {check.name}", remedy=check.remedy)


def _safely(function: Callable[[Facts], Iterator[Check]], facts: Facts) -> list[Check]:
    try:
        return list(function(facts))
    except KhoError as error:
        return [Check(function.__name__.strip("_"), CheckResult.fail, _evidence(error), error.remedy)]
    except OSError as error:
        return [
            Check(
                function.__name__.strip("_"),
                CheckResult.fail,
                f"{error.filename}: {errno_text(error)}",
                "Run khod as root.",
            )
        ]


def _evidence(error: KhoError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what


def _kho(facts: Facts) -> Iterator[Check]:
    kernel = facts.probed.kernel
    result = CheckResult.unsupported if kernel is None else CheckResult.passed
    yield Check("kho", result, facts.probed.what, facts.probed.remedy)


def _scratch(facts: Facts) -> Iterator[Check]:
    if facts.probed.kernel is not None:
        regions = facts.probed.kernel.scratch()
        total = sum(region.size for region in regions) >> 20
        yield Check("scratch", CheckResult.passed, f"{total} MiB in {len(regions)} regions: {shown(regions)}", "")


def shown(regions: list[Region]) -> str:
    """Put regions in words, sizes in MiB."""
    return ", ".join(f"{region.size >> 20} MiB at {region.addr:#x}" for region in regions)


def _kexec(facts: Facts) -> Iterator[Check]:
    if facts.kexec.load_disabled():
        yield Check(
            "kexec",
            CheckResult.fail,
            f"Loading is switched off: {LOAD_DISABLED} is 1",
            "It stays so until a reboot; find who sets it (sysctl.d).",
        )
    elif (limit := facts.kexec.load_limit()) is not None and limit < UNDOABLE_LOAD:
        yield Check(
            "kexec",
            CheckResult.fail,
            f"{LOAD_LIMIT} allows {limit} more calls, and a load and its undo are two",
            "It cannot be raised until a reboot; find who sets it (sysctl.d).",
        )
    else:
        yield Check("kexec", CheckResult.passed, "Loading is allowed", "")


def _slot(facts: Facts) -> Iterator[Check]:
    if facts.foreign:
        yield Check(
            "foreign",
            CheckResult.fail,
            f"Something other than khod is at work: {said(facts.observed)}",
            "Finish it by hand, or put it back with: khoctl abort --force",
        )
    else:
        yield Check("foreign", CheckResult.passed, f"Nobody else is at work: {said(facts.observed)}", "")


def _suspect(facts: Facts) -> Iterator[Check]:
    if facts.record.suspect and facts.record.boot_id == facts.observed.boot_id:
        refuse = facts.config.policy.after_forgetful_abort == "refuse"
        yield Check(
            "state",
            CheckResult.fail if refuse else CheckResult.warn,
            facts.record.suspect[0].upper() + facts.record.suspect[1:],
            'Reboot, or set policy.after_forgetful_abort = "warn".',
        )


def _leaks(facts: Facts) -> Iterator[Check]:
    failed, most = facts.record.failed_activations, facts.config.policy.max_failed_activations
    if failed and facts.record.boot_id == facts.observed.boot_id:
        yield Check(
            "activations",
            CheckResult.fail if failed >= most else CheckResult.warn,
            f"{failed} activations failed in this boot, each may have leaked kernel memory (up to dt_max)",
            "Find the cause in the kernel log; policy.max_failed_activations sets the bound.",
        )


def _disk(facts: Facts) -> Iterator[Check]:
    free = facts.store.free()
    if free < RESERVE:
        yield Check(
            "disk",
            CheckResult.fail,
            f"{free >> 10} KiB are free in {facts.store.directory}, the record and the "
            f"snapshot may need {RESERVE >> 10}",
            "Make room there.",
        )
    else:
        yield Check("disk", CheckResult.passed, f"{free >> 20} MiB are free in {facts.store.directory}", "")


def _record(facts: Facts) -> Iterator[Check]:
    try:
        facts.store.read()
    except RecordError as error:
        yield Check("record", CheckResult.fail, _evidence(error), error.remedy)


def _producers(facts: Facts) -> Iterator[Check]:
    try:
        names = [producer.name for rank in ranks(facts.producers()) for producer in rank]
    except ConfigError as error:
        yield Check("producers", CheckResult.fail, _evidence(error), error.remedy)
        return
    if missing := sorted(set(facts.config.producers.require) - set(names)):
        yield Check(
            "producers",
            CheckResult.fail,
            f"Required and not here: {', '.join(missing)}",
            "Start what registers under these names; producers.require asks for them.",
        )
    else:
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        yield Check("producers", CheckResult.passed, f"{len(names)}: {shown or 'none'}", "")


def _state(facts: Facts) -> Iterator[Check]:
    """Look for the required kernel producers where the tree can be read without entering the active phase."""
    kernel, required = facts.probed.kernel, set(facts.config.producers.require_kernel)
    if not required or kernel is None or kernel.order is not Order.load_first:
        return
    if missing := sorted(required - present(kernel.tree(), kernel.generation).keys()):
        error = without(missing)
        yield Check("kernel-producers", CheckResult.fail, error.what, error.remedy)
    else:
        yield Check("kernel-producers", CheckResult.passed, f"In the tree: {', '.join(sorted(required))}", "")


def _claims(facts: Facts) -> Iterator[Check]:
    if facts.record.producers and facts.record.phase in RESTING:
        names = ", ".join(holder.name for holder in facts.record.producers)
        yield Check(
            "claims",
            CheckResult.fail,
            f"Left before the last jump and not taken back yet: {names}; another jump would lose it",
            "Start these producers, or give their state up with: khoctl producers forget NAME",
        )


CHECKS = (_kho, _scratch, _kexec, _slot, _suspect, _leaks, _disk, _record, _producers, _state, _claims)
