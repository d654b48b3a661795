# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hears tests/lab/heart.py from outside of its guest."""

import re
import threading
import time
from dataclasses import dataclass

from tests.lab.machine import Machine

BEAT = re.compile(r"~(\d+) (\d+\.\d+)~")
JUMP = "Starting new kernel"
JUMP_SECONDS = 240.0


@dataclass(frozen=True)
class Silence:
    """What was heard, in seconds since the last beat before the jump.

    `jump` is when the kernel said that it jumps, `kernel` where CLOCK_MONOTONIC of the next one is 0, `end` when the
    heart beat again.
    """

    jump: float
    kernel: float
    end: float


class Witness:
    """Hears when the last beat before the jump came, and the first one after it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._beats: list[tuple[int, float, float]] = []
        """Of each beat its number, when it was heard, and the guest's clock."""
        self._jumped: float | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def begin(self) -> None:
        """Listen from the next beat on."""
        self._since = len(self._machine.console())
        self._thread.start()

    def silence(self) -> Silence:
        """Wait for the end of the silence. The beats' numbers show that none was lost."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._jumped is not None
        numbers = [number for number, _, _ in self._beats]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        began = max(heard for _, heard, _ in self._beats if heard <= self._jumped)
        end, clock = next((heard, clock) for _, heard, clock in self._beats if heard > self._jumped)
        return Silence(self._jumped - began, end - clock - began, end - began)

    def _listen(self) -> None:
        try:
            self._machine.wait("the heart in the next kernel", JUMP_SECONDS, self._hear)
        except BaseException as error:  # noqa: BLE001 - it is raised where the silence is asked for
            self._error = error

    def _hear(self) -> bool | None:
        """Note what is new; true when a beat came after the jump."""
        now, text = time.monotonic(), self._machine.console()
        if self._jumped is None and JUMP in text[self._since :]:
            self._jumped = now
        for found in BEAT.finditer(text, self._since):
            self._beats.append((int(found[1]), now, float(found[2])))
            self._since = found.end()
        return True if self._jumped is not None and self._beats[-1][1] > self._jumped else None
