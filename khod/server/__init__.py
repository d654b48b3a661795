"""The Varlink server: what the socket serves, and to whom."""

from collections.abc import Callable

from asyncvarlink import VarlinkInterfaceRegistry
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from khod import __version__
from khod.config import Access
from khod.server.connection import Connection, Count
from khod.server.handover import Service
from khod.server.listener import Listener
from khod.server.producers import Producers

__all__ = ["Listener", "Producers", "Service", "connections", "registry"]


def registry(service: Service, producers: Producers) -> VarlinkInterfaceRegistry:
    """What the socket serves: the interfaces and their introspection."""
    made = VarlinkInterfaceRegistry()
    made.register_interface(service)
    made.register_interface(producers)
    made.register_interface(VarlinkServiceInterface("khod", "khod", __version__, "https://kho.io/", made))
    return made


def connections(made: VarlinkInterfaceRegistry, access: Callable[[], Access]) -> Callable[[], Connection]:
    """A factory of connections that share their count; `access` is asked anew, for a reload."""
    count = Count()
    return lambda: Connection(made, count, access().max_connections_per_user)
