"""What must hold before the kernel is touched: named checks, each with its evidence and a remedy.

`khoctl check` shows them all; a handover is refused by the first that fails. `[checks]` of the configuration
says what a finding of each amounts to.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from khod.config import Config
from khod.errors import KhoError, Refused, Unsupported, errno_text
from khod.model import Check, CheckResult
from khod.preflight import holders, host, image, kernel
from khod.preflight.facts import Facts, Finding
from khod.text import printable

CHECKS: Mapping[str, Callable[[Facts], Finding | None]] = {
    "kho": kernel.kho,
    "scratch": kernel.scratch,
    "capability": kernel.capability,
    "namespaces": kernel.namespaces,
    "processors": kernel.processors,
    "kexec": kernel.kexec,
    "lockdown": kernel.lockdown,
    "foreign": kernel.foreign,
    "state": kernel.state,
    "activations": kernel.activations,
    "crash": kernel.crash,
    "memory": kernel.memory,
    "watchdog": host.watchdog,
    "inhibitors": host.inhibitors,
    "uptime": host.uptime,
    "disk": host.disk,
    "record": host.record,
    "producers": holders.producers,
    "kernel_producers": holders.kernel_producers,
    "claims": holders.claims,
    "sessions": holders.sessions,
}
"""Those that need no image; one that has nothing to say is left out."""

IMAGE_CHECKS: Mapping[str, Callable[[Facts], Finding | None]] = {
    "image": image.image,
    "initrd": image.initrd,
    "cmdline": image.cmdline,
    "formats": image.formats,
    "fit": image.fit,
    "signature": image.signature,
}
"""Those of the next kernel."""


def run(facts: Facts) -> list[Check]:
    """Run the checks of this host, or with a target those of the next kernel; what cannot be read is a finding.

    What they found of others' text (names, reasons, versions, command lines) is escaped: each is one line.
    """
    checks = CHECKS if facts.target is None else IMAGE_CHECKS
    found = [(name, _found(name, function, facts)) for name, function in checks.items()]
    return [
        Check(name, one.result, printable(one.evidence), printable(one.remedy))
        for name, one in found
        if one is not None
    ]


def unusable(name: str, error: Refused) -> Check:
    """The check `name` of an image that could not even be taken into memory."""
    found = Finding.of(error)
    return Check(name, found.result, printable(found.evidence), printable(found.remedy))


def require(checks: list[Check]) -> None:
    """Raise what the first failed check amounts to: Unsupported or Refused."""
    for check in checks:
        if check.result is CheckResult.unsupported:
            raise Unsupported(check.evidence, where=check.name, remedy=check.remedy)
        if check.result is CheckResult.fail:
            raise Refused(check.evidence, where=f"check {check.name}", remedy=check.remedy)


def overridden(checks: list[Check]) -> list[str]:
    """Say what was found by those that are switched off and would have refused the handover, a line each."""
    return [f"going on all the same: {check.evidence}" for check in checks if check.result is CheckResult.off]


def _found(name: str, function: Callable[[Facts], Finding | None], facts: Facts) -> Finding | None:
    try:
        found = function(facts)
    except KhoError as error:
        found = Finding.of(error)
    except OSError as error:
        found = Finding.fail(f"{error.filename}: {errno_text(error)}", "Run khod as root.")
    if found is None:
        return None
    judgement = judged(facts.config, name)
    if judgement == "off":
        evidence = f"Switched off (checks.{name} in /etc/kho/khod.toml): {found.evidence}"
        found = replace(found, evidence=evidence, remedy="")
    return found.judged(judgement)


def judged(config: Config, name: str) -> str:
    """What the configuration makes of a check: default, warn, fail or off."""
    judgement: str = getattr(config.checks, name)
    return judgement
