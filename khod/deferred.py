# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modules that khod does not need before producers have back what they left: each is imported when it is first used.

After a jump, producers wait while khod imports. What only checks, images, the history or reports need comes later:

    if TYPE_CHECKING:
        from khod import preflight
    else:
        preflight = defer_module("khod.preflight")

`load_deferred` imports all that is left, once there is time.
"""

from importlib import import_module
from typing import Any


class DeferredModule:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.import_now(), attribute)

    def import_now(self) -> Any:
        """Import the module; nothing happens if it is imported already."""
        return import_module(self._name)


_DEFERRED: list[DeferredModule] = []


def defer_module(name: str) -> DeferredModule:
    """Return what stands for the module until it is imported."""
    module = DeferredModule(name)
    _DEFERRED.append(module)
    return module


def load_deferred() -> None:
    """Import every module that was deferred, and those that they defer in turn."""
    for module in _DEFERRED:  # grows meanwhile
        module.import_now()
