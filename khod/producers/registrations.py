# SPDX-License-Identifier: LGPL-2.1-or-later
"""The registered producers, kept across a restart of khod: a handover must not begin without one that is not back yet.

A file with one line for each registration and each departure in this boot. Appending a line adds about ten microseconds
to a registration; a line that is cut off, for lack of space, is ignored. The file outlives khod, not the boot, so
nothing of it is synced.
"""

import errno
import json
import os
from pathlib import Path

from khod.dataclass import dataclass
from khod.handover.record import Owner, Process
from khod.values import decode_value, encode_value

MAX_LINES = 1 << 14
"""Lines that are appended before the file is rewritten."""


@dataclass(frozen=True)
class RegisteredProducer:
    """A producer that was registered, and the process that had its connection."""

    name: str
    owner: Owner
    process: Process


class Registrations:
    """The file of registrations. Methods raise OSError; a line that cannot be read is ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot_id = ""
        self._fd: int | None = None
        self._known: dict[str, RegisteredProducer] = {}
        self._lines = 0

    def load_registered(self, boot_id: str) -> list[RegisteredProducer]:
        """Return the producers that were registered in this boot and had not left, and rewrite the file with them."""
        for line in self._read_lines():
            try:
                values = json.loads(line)
                if values["boot_id"] != boot_id:
                    continue
                if "left" in values:
                    self._known.pop(values["left"], None)
                else:
                    found = decode_value(RegisteredProducer, values["registered"])
                    self._known[found.name] = found
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # the line was cut off, for lack of space
        self._boot_id = boot_id
        self._rewrite_file()
        return list(self._known.values())

    def add_registered(self, registered: RegisteredProducer) -> None:
        """Store a registration."""
        self._known[registered.name] = registered
        self._append_line({"registered": encode_value(registered)})

    def remove_name(self, name: str) -> None:
        """Remove a producer that has left, or that an operator has given up."""
        if self._known.pop(name, None) is not None:
            self._append_line({"left": name})

    def close_file(self) -> None:
        """Close the file and keep its contents: khod ends, and its producers' connections with it."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def _read_lines(self) -> list[str]:
        try:
            return self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _rewrite_file(self) -> None:
        """Write the file anew, with the producers that are registered now."""
        new = self._path.with_name(f"{self._path.name}.new")
        with open(new, "wb") as file:
            file.writelines(self._encode_line({"registered": encode_value(found)}) for found in self._known.values())
        new.rename(self._path)
        self.close_file()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._lines = 0

    def _encode_line(self, values: dict[str, object]) -> bytes:
        """Return one line, after a line break: the line before may have been cut off."""
        return f"\n{json.dumps({'boot_id': self._boot_id, **values}, default=encode_value)}\n".encode()

    def _append_line(self, values: dict[str, object]) -> None:
        if self._fd is None:
            return
        self._lines += 1
        if self._lines > MAX_LINES:
            self._rewrite_file()
        else:
            line = self._encode_line(values)
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
