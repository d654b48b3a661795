# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interfaces of the sockets. That of the producers is there at once; the others when one of them is asked for."""

from collections.abc import Callable, Iterator
from typing import Any

from asyncvarlink import VarlinkInterface, VarlinkInterfaceRegistry, VarlinkMethodCall

from khod.deferred import load_deferred
from khod.wire import PRODUCER


class Interfaces(VarlinkInterfaceRegistry):
    """The interfaces by their names; `build_others` makes all but that of the producers."""

    def __init__(self, producers: VarlinkInterface, build_others: Callable[[], list[VarlinkInterface]]) -> None:
        super().__init__()
        self.register_interface(producers)
        self._build_others: Callable[[], list[VarlinkInterface]] | None = build_others

    def complete(self) -> None:
        """Have all interfaces, with all that they need imported."""
        if self._build_others is not None:
            load_deferred()  # an operation that may hold producers imports nothing afterwards
            made, self._build_others = self._build_others(), None
            for interface in made:
                self.register_interface(interface)

    def lookup_method(self, call: VarlinkMethodCall) -> Any:
        if call.method_interface != PRODUCER:
            self.complete()
        return super().lookup_method(call)

    def __iter__(self) -> Iterator[VarlinkInterface]:
        self.complete()
        return super().__iter__()

    def __getitem__(self, interface: str) -> VarlinkInterface:
        self.complete()
        return super().__getitem__(interface)
