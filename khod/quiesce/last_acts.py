# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an orderly shutdown writes at its end, where khod calls reboot(2) itself after a quiesce.

A random seed for the next boot, and the end of this boot in wtmp: units with RemainAfterExit= do that when they are
stopped. They are left as they are, and their own commands run, as units of khod's. The programs that
systemd-shutdown(8) runs at its end run after them.
"""

import asyncio
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from khod.dataclass import dataclass
from khod.producers.barrier import ParticipantVeto
from khod.producers.commands import Command, CommandRunner
from khod.producers.execution import PATH, Execution
from khod.systemd.dbus import BusError, systemd_bus
from khod.systemd.manager import Systemd

PROGRAMS = Path("/usr/lib/systemd/system-shutdown")
"""Each is run with the word `kexec`, side by side with the others."""
UNIT_PREFIX = "kho-quiesce-"


@dataclass(frozen=True)
class Act:
    """A unit whose ExecStop= runs; with `has_undo` its ExecStart= runs if the host stays up."""

    unit: str
    has_undo: bool = False


ACTS = (
    Act("systemd-random-seed.service"),
    Act("systemd-update-utmp.service", has_undo=True),
    Act("wtmpdb-update-boot.service", has_undo=True),
)


async def carry_out(runner: CommandRunner) -> None:
    """Run what the active units among ACTS run when they are stopped; a failure is only logged."""
    await _run_all(runner, "ExecStop", ACTS)
    await asyncio.gather(*(_run_command(runner, path.name, [str(path), "kexec"]) for path in _list_programs()))


async def take_back(runner: CommandRunner) -> None:
    """Run what records that this boot goes on."""
    await _run_all(runner, "ExecStart", [act for act in ACTS if act.has_undo])


async def _run_all(runner: CommandRunner, key: str, acts: Iterable[Act]) -> None:
    found: list[tuple[str, Sequence[str]]] = []
    with suppress(BusError):
        async with systemd_bus() as bus:
            systemd = Systemd(bus)
            for act in acts:
                if (await systemd.read_state(act.unit)).active == "active":
                    service = await systemd.read_properties(act.unit, "Service")
                    found += [(act.unit, argv) for argv in _read_commands(service.get(key))]
    await asyncio.gather(*(_run_command(runner, unit, argv) for unit, argv in found))


def _list_programs() -> list[Path]:
    try:
        return [path for path in sorted(PROGRAMS.iterdir()) if path.is_file() and os.access(path, os.X_OK)]
    except OSError:
        return []


def _read_commands(value: Any) -> Iterable[Sequence[str]]:
    """Return the words of each command in ExecStart= or ExecStop=, as D-Bus has it: a(sasbttttuii)."""
    for _path, argv, *_ in value or ():
        yield argv


async def _run_command(runner: CommandRunner, name: str, argv: Sequence[str]) -> None:
    environment = {"PATH": PATH, "KHO_VERB": "quiesce"}
    command = Command(name.removesuffix(".service"), argv, environment, unit_prefix=UNIT_PREFIX)
    with suppress(ParticipantVeto):
        execution = await Execution.start(runner, command)
        await execution.finish(lambda _reason: None)
