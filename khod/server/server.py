# SPDX-License-Identifier: LGPL-2.1-or-later
"""What serves the clients of the listening sockets."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
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


class Server:
    """Serves an engine on sockets that listen; `access` is called each time, because of reloads."""

    def __init__(
        self,
        engine: Engine,
        sockets: Sequence[socket.socket],
        access: Callable[[], Access],
        read_metrics: Callable[[], Awaitable["MetricFacts"]] | None = None,
    ) -> None:
        def build_others() -> list[VarlinkInterface]:
            return [
                handover.Service(engine),
                *([] if read_metrics is None else [metrics.SystemdMetrics(read_metrics)]),
                VarlinkServiceInterface("khod", "khod", __version__, "https://kho.io/", interfaces),
            ]

        interfaces = Interfaces(Producers(engine), build_others)
        self.monitors = Monitors(engine)
        self.clients = Clients(interfaces, self.monitors, access)
        self._listeners = [Listener(sock, self.clients) for sock in sockets]

    async def close(self, seconds: float) -> None:
        """Accept nobody any more; give the clients this time to take their last answers, and end all connections."""
        self.monitors.end_monitors()
        for listener in self._listeners:
            listener.close()
        await asyncio.wait({asyncio.ensure_future(self.clients.wait_closed())}, timeout=seconds)
        self.clients.hang_up_all()
