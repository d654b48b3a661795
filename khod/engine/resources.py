# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of the engine work with on this host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from khod.config import Settings
from khod.dataclass import dataclass
from khod.handover.record import Store
from khod.kernel.kexec import Kexec
from khod.kernel.thread import Workers
from khod.producers.health import HealthChecks
from khod.producers.session_scan import Scanner
from khod.producers.sessions import Sessions
from khod.systemd.shutdown import Shutdown

if TYPE_CHECKING:
    from khod.target.target import Verify


async def is_up() -> None:
    """Return at once: the host has all of its services."""


@dataclass(frozen=True)
class Resources:
    """The kernel's calls, the threads that make them, the files and sessions khod keeps, and the configuration.

    `health` has the operator's checks of verify.d. `verify` finds out who made the files of the next kernel. `scanner`
    finds the LUO sessions of every process. `shutdown` asks systemd whether the host is on its way into the kexec;
    without it that is not known. `host_up` returns when the host has the services that hooks and health checks may
    need.
    """

    kexec: Kexec
    store: Store
    workers: Workers
    settings: Settings
    sessions: Sessions
    scanner: Scanner
    health: HealthChecks
    verify: Verify
    shutdown: Shutdown | None = None
    host_up: Callable[[], Awaitable[None]] = is_up
