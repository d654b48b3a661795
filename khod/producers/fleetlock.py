# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of a FleetLock server as a producer: no handover begins without it where /etc/kho/fleetlock.toml exists.

It is a leader: the only one that is told `prepare` before all others, and told `cancel` after all others. Its commands
run as those of a hook; what they do: `khod.fleetlock.program`.
"""

import os
import sys
from dataclasses import field
from pathlib import Path

from khod.dataclass import dataclass
from khod.files import Fragment
from khod.fleetlock import FILE
from khod.fleetlock.settings import load_settings
from khod.producers import service_settings
from khod.producers.barrier import ParticipantVeto, ProducerCall, Verb
from khod.producers.children import Children
from khod.producers.commands import Command, CommandRunner
from khod.producers.configured import Configured
from khod.producers.execution import PATH, Execution
from khod.producers.order import FLEETLOCK
from khod.systemd.setting_values import Property
from khod.wire import SOCKET

START_SECONDS = 15.0
"""Seconds for the start of the program, beside those of its requests."""
HELD = "held"
"""The producer's note once it has the lock."""
PACKAGES = Path(__file__).parents[2]
"""Where khod's own modules are: the program is of the same khod."""
SANDBOX = {
    "CapabilityBoundingSet": "",
    "LockPersonality": True,
    "MemoryDenyWriteExecute": True,
    "MemoryMax": "256M",
    "NoNewPrivileges": True,
    "PrivateDevices": True,
    "ProtectClock": True,
    "ProtectControlGroups": True,
    "ProtectHome": "read-only",
    "ProtectHostname": True,
    "ProtectKernelLogs": True,
    "ProtectKernelModules": True,
    "ProtectKernelTunables": True,
    "ProtectProc": "invisible",
    "ProtectSystem": "strict",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    "RestrictNamespaces": True,
    "RestrictRealtime": True,
    "RestrictSUIDSGID": True,
    "SystemCallArchitectures": "native",
    "SystemCallFilter": ["@system-service"],
}
"""The settings of its unit, as in khod-fleetlock@.service. It stays root without any capability, so that it reads the
key of a client certificate, and may start a unit."""


@dataclass(frozen=True)
class FleetLock(Configured):
    """The lock of this host. `root` is where its file is, `socket` is khod's own."""

    settings: dict[str, Property] = field(default_factory=dict)
    runner: CommandRunner = field(default_factory=Children, compare=False, repr=False)
    root: Path = Path("/")
    socket: Path = Path(SOCKET)
    kind: str = FLEETLOCK

    async def _carry_out(self, telling: ProducerCall) -> str | None:
        """Get the lock, confirm it if it is held, or release it; ParticipantVeto without it.

        A lock that is not released now stops no rollback: khod-fleetlock@settle.service releases it later, or keeps it
        on a host that is degraded.
        """
        if telling.verb is Verb.prepare:
            await self._run(telling, "check" if telling.note else "lock")
            telling.note = HELD
        elif telling.verb is Verb.cancel:
            try:
                await self._run(telling, "settle", "--rolled-back", f"--socket={self.socket}")
            except ParticipantVeto as error:
                return f"ready; the lock is not released now: {error}"
        return None

    async def _run(self, telling: ProducerCall, *words: str) -> None:
        argv = [sys.executable, "-P", "-B", "-m", "khod.fleetlock", *words, f"--root={self.root}"]
        environment = {"PATH": PATH, "KHO_NAME": self.name, "KHO_VERB": telling.verb.value, "KHO_RUN": telling.run}
        command = Command(self.name, argv, environment | {"PYTHONPATH": os.fspath(PACKAGES)}, self.settings)
        execution = await Execution.start(self.runner, command)
        await execution.finish(lambda reason: telling.not_yet(reason, None))


def read_fleetlock(root: Path, runner: CommandRunner, socket: Path) -> FleetLock:
    """Return the producer for the file below `root`; ConfigError if it cannot be used."""
    found = load_settings(root)
    sandbox = service_settings.read_settings(SANDBOX, Fragment(root / FILE, "", {})) if runner.has_units else {}
    timeout = found.deadline + found.timeout + START_SECONDS
    return FleetLock(FLEETLOCK, timeout, settings=sandbox, runner=runner, root=root, socket=socket)
