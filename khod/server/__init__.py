# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink server: what the socket serves, and to whom.

Every user may connect and ask. The kernel identifies the user; before that, a client costs no more than a connection.
`limits` says how many connections there may be and what each may hold, `load` how the time is divided, `rules` who may
call what.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from asyncvarlink import VarlinkInterface
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from khod import __version__
from khod.config import Access
from khod.deferred import defer_module
from khod.engine import Engine
from khod.server.clients import Clients
from khod.server.interfaces import Interfaces
from khod.server.listener import Listener
from khod.server.monitors import Monitors
from khod.server.producers import Producers

if TYPE_CHECKING:
    from khod.metrics.table import MetricFacts
    from khod.server import handover, metrics
else:
    handover = defer_module("khod.server.handover")
    metrics = defer_module("khod.server.metrics")

__all__ = ["Listener", "Monitors", "build_clients"]


def build_clients(
    engine: Engine,
    monitors: Monitors,
    access: Callable[[], Access],
    read_metrics: Callable[[], Awaitable["MetricFacts"]] | None = None,
) -> Clients:
    """Return the clients of this engine, for a Listener; `access` is called each time, because of reloads."""

    def build_others() -> list[VarlinkInterface]:
        return [
            handover.Service(engine),
            *([] if read_metrics is None else [metrics.SystemdMetrics(read_metrics)]),
            VarlinkServiceInterface("khod", "khod", __version__, "https://kho.io/", interfaces),
        ]

    interfaces = Interfaces(Producers(engine), build_others)
    return Clients(interfaces, monitors, access)
