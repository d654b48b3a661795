# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks before the kernel is touched: each has a name, evidence and a remedy.

`khoctl check` shows them all; a handover is refused by the first that fails. `[checks]` of the configuration decides
the weight of each check's findings.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from khod.config import Config
from khod.errors import CheckFailed, KhoError, Refused, Unsupported, errno_text
from khod.model import Check, CheckResult
from khod.preflight import boot_cost, holders, host, image, kernel, provenance, trial
from khod.preflight.facts import CheckFinding, Facts
from khod.text import printable

CHECKS: Mapping[str, Callable[[Facts], CheckFinding | None]] = {
    "kho": kernel.check_kho,
    "scratch": kernel.check_scratch,
    "capability": kernel.check_capability,
    "namespaces": kernel.check_namespaces,
    "processors": kernel.check_processors,
    "kexec": kernel.check_kexec,
    "lockdown": kernel.check_lockdown,
    "foreign": kernel.check_foreign,
    "state": kernel.check_state,
    "activations": kernel.check_activations,
    "crash": kernel.check_crash,
    "memory": kernel.check_memory,
    "watchdog": host.check_watchdog,
    "inhibitors": host.check_inhibitors,
    "quiesce": holders.check_quiesce,
    "uptime": host.check_uptime,
    "disk": host.check_disk,
    "record": host.check_record,
    "producers": holders.check_producers,
    "kernel_producers": holders.kernel_producers,
    "health": holders.check_health,
    "claims": holders.check_claims,
    "sessions": holders.check_sessions,
}
"""The checks that need no image; a check that returns None is left out."""

IMAGE_CHECKS: Mapping[str, Callable[[Facts], CheckFinding | None]] = {
    "provenance": provenance.check_provenance,
    "image": image.check_image,
    "initrd": image.check_initrd,
    "cmdline": image.check_cmdline,
    "formats": image.check_formats,
    "fit": image.check_fit,
    "signature": image.check_signature,
    "trial": trial.check_trial,
    "boot_cost": boot_cost.check_boot_cost,
}
"""The checks of the next kernel."""


def run_checks(facts: Facts) -> list[Check]:
    """Run the checks of this host, or with a target those of the next kernel; an error in a check becomes a finding.

    Text from others in the findings (names, reasons, versions, command lines) is escaped, so that each is one line.
    """
    checks = CHECKS if facts.target is None else IMAGE_CHECKS
    found = [(name, _run_check(name, function, facts)) for name, function in checks.items()]
    return [
        Check(name, one.result, printable(one.evidence), printable(one.remedy))
        for name, one in found
        if one is not None
    ]


def unusable_check(name: str, error: Refused) -> Check:
    """Return the failed check `name` for an image that could not be read into memory."""
    found = CheckFinding.from_error(error)
    return Check(name, found.result, printable(found.evidence), printable(found.remedy))


def require_passed(checks: list[Check]) -> None:
    """Raise Unsupported or CheckFailed for the first failed check."""
    for check in checks:
        if check.result is CheckResult.unsupported:
            raise Unsupported(check.evidence, where=check.name, remedy=check.remedy)
        if check.result is CheckResult.fail:
            raise CheckFailed(check.evidence, check=check.name, remedy=check.remedy)


def overridden_findings(checks: list[Check]) -> list[str]:
    """Return a line for each failure that is switched off and would have refused the handover."""
    return [f"going on all the same: {check.evidence}" for check in checks if check.result is CheckResult.off]


def _run_check(name: str, function: Callable[[Facts], CheckFinding | None], facts: Facts) -> CheckFinding | None:
    if facts.target is not None and facts.target.is_refused and name not in ("provenance", "trial"):
        return CheckFinding.skip_with("Not inspected: see the check `provenance`")
    try:
        found = function(facts)
    except KhoError as error:
        found = CheckFinding.from_error(error)
    except OSError as error:
        found = CheckFinding.fail_with(f"{error.filename}: {errno_text(error)}", "Run khod as root.")
    except Exception as error:  # noqa: BLE001 - unexpected output of a kernel must not end the other checks
        found = CheckFinding.fail_with(
            f"khod itself failed: {error!r}", f'Report it. To go on all the same: checks.{name} = "warn" in khod.toml'
        )
    if found is None:
        return None
    judgement = configured_judgement(facts.config, name)
    if judgement == "off":
        evidence = f"Switched off (checks.{name} in /etc/kho/khod.toml): {found.evidence}"
        found = replace(found, evidence=evidence, remedy="")
    return found.with_judgement(judgement)


def configured_judgement(config: Config, name: str) -> str:
    """Return how the configuration treats a check: default, warn, fail or off."""
    judgement: str = getattr(config.checks, name)
    return judgement
