# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that thaws the file systems where khod dies between FIFREEZE and the jump.

The next khod cannot. Seen with systemd 262 and 7.3.4: whatever sets up its sandbox calls mkdir(2) before khod is
executed, which waits for ever on a frozen file system. So a unit of its own, started before the freeze, waits for the
end of khod: khod holds the write end of a FIFO.
"""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

from khod.kernel.filesystems import FrozenFileSystems
from khod.producers.barrier import ParticipantVeto
from khod.producers.commands import Command, CommandRunner
from khod.producers.execution import PATH, Execution

LOG = logging.getLogger(__name__)
FIFO_NAME = "thaw-guard"
READY_SUFFIX = ".ready"
SCRIPT = """\
exec 3< "$1"
echo ready > "$1.ready"
cat <&3
[ -e "$2" ] || exit 0
while IFS= read -r path; do fsfreeze -u "$path"; done < "$2"
rm -f "$2"
"""
START_SECONDS = 10.0
POLL_SECONDS = 0.05


class ThawGuard:
    """The guard of these file systems, which are frozen only while it waits. `runner` runs it."""

    def __init__(self, runner: CommandRunner, filesystems: FrozenFileSystems) -> None:
        self._runner = runner
        self._filesystems = filesystems
        self._held = -1
        self._ending: asyncio.Future[None] | None = None

    async def start(self) -> bool:
        """Start the guard; whether it waits now. Without it the disks are synced and not frozen."""
        note = self._filesystems.note
        if note is None:
            return False
        await self.stop()
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._start(note.with_name(FIFO_NAME), note)
        except (OSError, TimeoutError, ParticipantVeto) as error:
            LOG.warning("The file systems will be synced and not frozen: nobody would thaw them after khod: %s", error)
            await self.stop()
            return False
        self._filesystems.is_guarded = True
        return True

    async def _start(self, fifo: Path, note: Path) -> None:
        ready = Path(f"{fifo}{READY_SUFFIX}")
        os.mkfifo(fifo, 0o600)
        self._held = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
        command = Command(
            "thaw-guard",
            ["/bin/sh", "-c", SCRIPT, "sh", str(fifo), str(note)],
            {"PATH": PATH, "KHO_VERB": "thaw"},
            unit_prefix="kho-",
        )
        execution = await Execution.start(self._runner, command)
        self._ending = asyncio.ensure_future(execution.finish(lambda _reason: None))
        while not os.access(ready, os.F_OK):
            if self._ending.done():
                await self._ending
            await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        """End the guard; the file systems must be thawed before."""
        self._filesystems.is_guarded = False
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if self._ending is not None:
            ending, self._ending = self._ending, None
            with suppress(ParticipantVeto, OSError, TimeoutError):
                await asyncio.wait_for(ending, START_SECONDS)
        if self._filesystems.note is not None:
            for suffix in ("", READY_SUFFIX):
                with suppress(OSError):
                    self._filesystems.note.with_name(f"{FIFO_NAME}{suffix}").unlink()
