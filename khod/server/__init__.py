# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink server: what the socket serves, and to whom.

Every user may connect and ask. The kernel identifies the user; before that, a client costs no more than a connection.
`limits` says how many connections there may be and what each may hold, `load` how the time is divided, `rules` who may
call what.
"""

from collections.abc import Callable

from asyncvarlink import VarlinkInterfaceRegistry
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from khod import __version__
from khod.config import Access
from khod.server.clients import Clients
from khod.server.handover import Service
from khod.server.listener import Listener
from khod.server.metrics import SystemdMetrics
from khod.server.producers import Producers

__all__ = ["Listener", "Producers", "Service", "SystemdMetrics", "build_clients", "build_registry"]


def build_registry(
    service: Service, producers: Producers, metrics: SystemdMetrics | None = None
) -> VarlinkInterfaceRegistry:
    """Return what the sockets serve: the interfaces and their introspection."""
    made = VarlinkInterfaceRegistry()
    made.register_interface(service)
    made.register_interface(producers)
    if metrics is not None:
        made.register_interface(metrics)
    made.register_interface(VarlinkServiceInterface("khod", "khod", __version__, "https://kho.io/", made))
    return made


def build_clients(made: VarlinkInterfaceRegistry, access: Callable[[], Access]) -> Clients:
    """Return the clients of these interfaces, for a Listener; `access` is called each time, because of reloads."""
    return Clients(made, access)
