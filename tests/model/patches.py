# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod's modules find instead of the host's clock, files and descriptors while the model runs."""

import builtins
import fcntl
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tests.model import process
from tests.model.clock import Clock
from tests.model.disk import Disk

Replacement = tuple[object, str, Any]


class Ground(Protocol):
    """What stands below khod."""

    clock: Clock
    disk: Disk

    def new_uuid(self) -> uuid.UUID:
        """A name that no other run has."""


def operating_system(ground: Ground) -> list[Replacement]:
    """Calls of the standard library that must meet the model: descriptors, files below the state directory, time."""
    real = {
        name: getattr(os, name) for name in ("close", "dup", "fstat", "fsync", "rename", "replace", "mkdir", "statvfs")
    }
    opened, control, disk = io.open, fcntl.fcntl, ground.disk

    def close(fd: int) -> None:
        process.close(fd) if fd >= process.FIRST_FD else real["close"](fd)

    def dup(fd: int) -> int:
        return process.duplicate(fd) if fd >= process.FIRST_FD else int(real["dup"](fd))

    def fstat(fd: int) -> Any:
        return process.status_of(fd) if fd >= process.FIRST_FD else real["fstat"](fd)

    def fsync(fd: Any) -> None:
        if not disk.fsync(fd):
            real["fsync"](fd)

    def rename(old: Any, new: Any, **more: Any) -> None:
        disk.rename(real["rename"], old, new) if disk.has(new) else real["rename"](old, new, **more)

    def mkdir(path: Any, mode: int = 0o777, **more: Any) -> None:
        disk.mkdir(real["mkdir"], path, mode) if disk.has(path) else real["mkdir"](path, mode, **more)

    def statvfs(path: Any) -> Any:
        return disk.statvfs(path) if disk.has(path) else real["statvfs"](path)

    def open_(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        return (
            disk.open(opened, path, mode, arguments, more) if disk.has(path) else opened(path, mode, *arguments, **more)
        )

    def fcntl_(fd: int, command: int, argument: Any = 0) -> Any:
        return 0 if isinstance(fd, int) and fd >= process.FIRST_FD else control(fd, command, argument)

    calls: dict[str, Callable[..., Any]] = {
        "close": close,
        "dup": dup,
        "fstat": fstat,
        "fsync": fsync,
        "fdatasync": fsync,
        "rename": rename,
        "replace": rename,
        "mkdir": mkdir,
        "statvfs": statvfs,
    }
    return [
        *((os, name, call) for name, call in calls.items()),
        (builtins, "open", open_),
        (io, "open", open_),
        (fcntl, "fcntl", fcntl_),
        (time, "monotonic", ground.clock.monotonic),
        (time, "time", ground.clock.time),
        (uuid, "uuid4", ground.new_uuid),
    ]


@contextmanager
def installed(replacements: list[Replacement]) -> Iterator[None]:
    """Have the replacements in place."""
    before = [(where, name, getattr(where, name)) for where, name, _ in replacements]
    for where, name, value in replacements:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
