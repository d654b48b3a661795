# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong in the lab itself. None of these is the failure of a scenario: a scenario fails by assertion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LabError(Exception):
    """The lab could not do its part; the text says what to do about it."""


class GuestLost(LabError):
    """The guest's kernel panicked or its QEMU ended while something was expected of it."""


class GuestRebooted(LabError):
    """The guest went into another boot while a command of the earlier boot was still running."""


class WaitTimeout(LabError, TimeoutError):
    """A named condition did not come true before its deadline."""


@dataclass(frozen=True)
class Result:
    """How a command in the guest ended: exit status (-N for signal N) and both streams as text."""

    rc: int
    stdout: str
    stderr: str


class CommandFailed(LabError):
    """A command in the guest that was expected to succeed did not."""

    def __init__(self, argv: Sequence[str], result: Result) -> None:
        """Keep the command and its result as fields, for tests that look closer."""
        super().__init__(
            f"{' '.join(argv)} in the guest: exit status {result.rc}\nstdout: {result.stdout}\nstderr: {result.stderr}"
        )
        self.argv = tuple(argv)
        self.result = result
