# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's freezer of control groups, for units that systemd does not thaw.

systemd does not thaw a unit whose file was removed or masked since; the kernel does not know of files. systemd still
reports the unit as frozen, until `systemctl thaw` is possible again. khod's own unit has the control groups read-only
(ProtectControlGroups=), so a command in a unit of its own writes to them.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from khod.producers.cgroup import CGROUPS
from khod.producers.commands import Command, CommandRunner

SLICE = ".slice"
UNIT_TYPES = tuple(f".{kind}" for kind in ("service", "scope", "slice", "socket", "mount", "swap"))
"""The types of units that have a control group."""
THAW_GROUPS = 'for group; do [ ! -e "$group/cgroup.freeze" ] || printf 0 > "$group/cgroup.freeze" || exit 1; done'
"""A shell script; its arguments are directories of control groups, each of which may have ended meanwhile."""


async def thaw_group(path: str, name: str, runner: CommandRunner) -> bool:
    """Have the kernel thaw the control group at this path below CGROUPS; return whether it exists and was thawed.

    In a slice each unit was frozen by itself, and is thawed by itself. The command runs for the producer `name`.
    """
    groups: list[Path] = []
    with suppress(OSError):
        group = (Path(CGROUPS) / path.lstrip("/") / "cgroup.freeze").resolve(strict=True).parent
        if Path(CGROUPS) in group.parents:
            groups = [group, *(_member_groups(group) if path.endswith(SLICE) else ())]
    if not groups:
        return False
    command = Command(name, ["/bin/sh", "-c", THAW_GROUPS, "sh", *map(str, groups)], {})
    output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        running = await runner.start_command(command, output, output)
    except (OSError, ValueError):
        return False
    finally:
        os.close(output)
    try:
        return await running.wait_end() == 0
    finally:
        await running.end()


def _member_groups(group: Path) -> Iterator[Path]:
    """Yield the control groups of the units in a slice and in slices below it, but not those that a unit has made."""
    with os.scandir(group) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in names:
        if name.endswith(UNIT_TYPES):
            yield group / name
        if name.endswith(SLICE):
            with suppress(FileNotFoundError):
                yield from _member_groups(group / name)
