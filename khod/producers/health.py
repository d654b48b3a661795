# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's health checks: /etc/kho/verify.d/NAME.toml names a command that looks whether the host is well.

They run after the jump, once the producers have their state: side by side, each in a unit of its own
(kho-verify-NAME.service), within its own time limit, as commands of hooks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khod.concurrency.bounded import run_within
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import ConfigError, KhoError, UsageError
from khod.files import Fragment, list_toml, read_toml, require_type, unknown_key_error
from khod.model import Check, CheckResult, Finding, FindingSeverity, FindingSource
from khod.producers.barrier import ParticipantVeto
from khod.producers.commands import Command, CommandRunner
from khod.producers.configured import check_name, require_strings
from khod.text import printable

if TYPE_CHECKING:
    from khod.handover import evidence
    from khod.producers import execution as command_execution
else:
    evidence = defer_module("khod.handover.evidence")
    command_execution = defer_module("khod.producers.execution")

DIRECTORY = "etc/kho/verify.d"
UNIT_PREFIX = "kho-verify-"
NEEDS = ("required", "wanted")
KEYS = ("command", "need", "timeout")
DEFAULT_SECONDS = 30.0
MAX_TIMEOUT_SECONDS = 300.0
"""The verification is not over before the last health check, and kho-verify.service has a time limit."""
MAX_HEALTH_CHECKS = 64
"""Files that are read: all of them run at the same time."""
REMEDY = "Look at the host, and at what it printed: journalctl -u kho-handover -b"


@dataclass(frozen=True)
class HealthCheck:
    """One file. `is_required` is for a host that is degraded without it; with `wrong` the file cannot be used."""

    name: str
    command: tuple[str, ...] = ()
    is_required: bool = True
    timeout: float = DEFAULT_SECONDS
    wrong: ConfigError | None = None

    @property
    def unstartable(self) -> str:
        """The command, if it is not there or is no program, else ""."""
        return "" if self.wrong or command_execution.is_startable(self.command[0]) else self.command[0]


class HealthChecks:
    """The health checks below `root`, read when they are asked for. `runner` runs their commands."""

    def __init__(self, root: Path, runner: CommandRunner) -> None:
        self._root = root
        self._runner = runner

    def load_checks(self) -> list[HealthCheck]:
        """Read every file, by name; ConfigError if the directory is there and cannot be read, which glob() hides."""
        paths = list_toml(self._root / DIRECTORY, "health check")
        found = [read_check(path) for path in paths[:MAX_HEALTH_CHECKS]]
        if len(paths) > MAX_HEALTH_CHECKS:
            surplus = ConfigError(
                f"There are {len(paths)} health checks, and khod runs {MAX_HEALTH_CHECKS}",
                where=str(paths[MAX_HEALTH_CHECKS]),
                remedy="Let one command look at more.",
            )
            found.append(HealthCheck(paths[MAX_HEALTH_CHECKS].stem, wrong=surplus))
        return found

    async def run_checks(self, checks: Iterable[HealthCheck], run: str) -> list[evidence.Evidence]:
        """Run health checks after the handover `run`, side by side; return what each found, in their order."""
        return list(await asyncio.gather(*(self._run_check(check, run) for check in checks)))

    async def _run_check(self, check: HealthCheck, run: str) -> evidence.Evidence:
        if check.wrong is not None:
            return _failed(check, f"{check.wrong.what} ({check.wrong.where})")
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await run_within(check.timeout, self._execute(check, run))
        except TimeoutError:
            return _failed(check, f"not done within {check.timeout:g} s")
        except (ParticipantVeto, KhoError, OSError) as error:
            return _failed(check, str(error))
        except Exception as error:  # noqa: BLE001 - any error of one: the others continue
            return _failed(check, f"khod itself failed: {error!r}")
        return evidence.Evidence.passed(_check_name(check), f"done in {loop.time() - began:.1f} s")

    async def _execute(self, check: HealthCheck, run: str) -> None:
        environment = {"PATH": command_execution.PATH, "KHO_NAME": check.name, "KHO_VERB": "verify", "KHO_RUN": run}
        command = Command(check.name, check.command, environment, unit_prefix=UNIT_PREFIX)
        execution = await command_execution.Execution.start(self._runner, command)
        await execution.finish(lambda _reason: None)


def read_check(path: Path) -> HealthCheck:
    """Read one file. What is wrong with it is in the check: it then fails by its name, as a required one."""
    need: Any = None
    try:
        check_name(path.stem)
        text, values = read_toml(path, "health check")
        need = values.get("need")
        return _parse_check(Fragment(path, text, values), path)
    except (UsageError, ConfigError) as error:
        wrong = ConfigError(error.what, where=error.where or str(path), remedy=error.remedy)
        return HealthCheck(path.stem, is_required=need != "wanted", wrong=wrong)


def _parse_check(fragment: Fragment, path: Path) -> HealthCheck:
    values = fragment.values
    if unknown := sorted(values.keys() - {*KEYS}):
        raise unknown_key_error(fragment.locate_key(unknown[0]), unknown[0], KEYS, "a health check")
    if "command" not in values:
        raise ConfigError("`command` is missing", where=str(path), remedy='Name it: command = ["/usr/bin/curl", ...]')
    need = values.get("need", "required")
    if need not in NEEDS:
        raise ConfigError(
            f"`need` is {need!r}", where=fragment.locate_key("need"), remedy=f"It takes one of: {', '.join(NEEDS)}."
        )
    timeout = require_type(values.get("timeout", DEFAULT_SECONDS), float, "timeout", fragment.locate_key("timeout"))
    if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigError(
            f"`timeout` is {timeout!r}",
            where=fragment.locate_key("timeout"),
            remedy=f"It must be a positive number of seconds, at most {MAX_TIMEOUT_SECONDS:g}.",
        )
    command = require_strings(values["command"], fragment, "command", some=True)
    return HealthCheck(path.stem, tuple(command), need == "required", timeout)


def _check_name(check: HealthCheck) -> str:
    return f"health {check.name}"


def _failed(check: HealthCheck, why: str) -> evidence.Evidence:
    """Return the failure of a check: a required one is a finding, a wanted one is only shown."""
    if not check.is_required:
        return evidence.Evidence(Check(_check_name(check), CheckResult.warn, printable(why), REMEDY))
    text = f"health check {check.name} failed: {printable(why)}"
    finding = Finding("", text, FindingSource.health, check.name, FindingSeverity.unknown)
    return evidence.Evidence.failed(_check_name(check), why, REMEDY, [finding])
