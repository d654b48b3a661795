# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold before the kernel is touched: named checks, each with its evidence and a remedy.

`khoctl check` shows them all; a handover is refused by the first that fails. `[checks]` of the configuration
says what a finding of each amounts to.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from khod.config import Config
from khod.errors import CheckFailed, KhoError, Refused, Unsupported, errno_text
from khod.model import Check, CheckResult
from khod.preflight import holders, host, image, kernel
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
    "uptime": host.check_uptime,
    "disk": host.check_disk,
    "record": host.check_record,
    "producers": holders.check_producers,
    "kernel_producers": holders.kernel_producers,
    "claims": holders.check_claims,
    "sessions": holders.check_sessions,
}
"""Those that need no image; one that has nothing to say is left out."""

IMAGE_CHECKS: Mapping[str, Callable[[Facts], CheckFinding | None]] = {
    "image": image.check_image,
    "initrd": image.check_initrd,
    "cmdline": image.check_cmdline,
    "formats": image.check_formats,
    "fit": image.check_fit,
    "signature": image.check_signature,
}
"""Those of the next kernel."""


def run_checks(facts: Facts) -> list[Check]:
    """Run the checks of this host, or with a target those of the next kernel; what cannot be read is a finding.

    What they found of others' text (names, reasons, versions, command lines) is escaped: each is one line.
    """
    checks = CHECKS if facts.target is None else IMAGE_CHECKS
    found = [(name, _run_check(name, function, facts)) for name, function in checks.items()]
    return [
        Check(name, one.result, printable(one.evidence), printable(one.remedy))
        for name, one in found
        if one is not None
    ]


def unusable_check(name: str, error: Refused) -> Check:
    """The check `name` of an image that could not even be taken into memory."""
    found = CheckFinding.from_error(error)
    return Check(name, found.result, printable(found.evidence), printable(found.remedy))


def require_passed(checks: list[Check]) -> None:
    """Raise what the first failed check amounts to: Unsupported or Refused."""
    for check in checks:
        if check.result is CheckResult.unsupported:
            raise Unsupported(check.evidence, where=check.name, remedy=check.remedy)
        if check.result is CheckResult.fail:
            raise CheckFailed(check.evidence, check=check.name, remedy=check.remedy)


def overridden_findings(checks: list[Check]) -> list[str]:
    """Say what was found by those that are switched off and would have refused the handover, a line each."""
    return [f"going on all the same: {check.evidence}" for check in checks if check.result is CheckResult.off]


def _run_check(name: str, function: Callable[[Facts], CheckFinding | None], facts: Facts) -> CheckFinding | None:
    try:
        found = function(facts)
    except KhoError as error:
        found = CheckFinding.from_error(error)
    except OSError as error:
        found = CheckFinding.fail_with(f"{error.filename}: {errno_text(error)}", "Run khod as root.")
    except Exception as error:  # noqa: BLE001 - a kernel that says what nobody expects must not end the other checks
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
    """What the configuration makes of a check: default, warn, fail or off."""
    judgement: str = getattr(config.checks, name)
    return judgement
