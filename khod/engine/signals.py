# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of the engine wait for."""

import asyncio
from dataclasses import field

from khod.dataclass import dataclass


@dataclass(frozen=True)
class Signals:
    """How far khod is, shared by the parts of one engine."""

    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Locked during an operation."""
    known: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the state of the host is known, and which producers may return. From then on producers register: a
    rollback at the start waits for them."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the start is complete."""
