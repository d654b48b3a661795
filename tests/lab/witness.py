# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hears tests/lab/heart.py from outside of its guest."""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab.machine import Machine

BEAT = re.compile(r"~(\d+) (\d+\.\d+)~")
JUMP = "Starting new kernel"
JUMP_SECONDS = 240.0
NEAR_BEATS = 50
"""How many beats on each side of the jump tell the guest's clock from the witness's."""


@dataclass(frozen=True)
class Beat:
    """One beat: its number, when it was heard, and the guest's CLOCK_MONOTONIC when it was made."""

    number: int
    heard: float
    clock: float


@dataclass(frozen=True)
class Silence:
    """What was heard, in seconds since the last beat before the jump.

    `jump` is when the kernel said that it jumps, `kernel` where CLOCK_MONOTONIC of the next one is 0, `end` when the
    heart beat again. The begin and the end are those of the beats by the guest's clocks: a machine with other work
    hears a beat late. How far these clocks are from the witness's is what the beat heard soonest shows.
    """

    jump: float
    kernel: float
    end: float


class Witness:
    """Hears the beats before the jump, and the first ones after it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._before: list[Beat] = []
        self._after: list[Beat] = []
        self._jump: tuple[float, int] | None = None
        """When the kernel's message was heard, and its place in the console's text."""
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
        assert self._jump is not None
        numbers = [beat.number for beat in (*self._before, *self._after)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        began = self._before[-1].clock + _heard_at_zero(self._before[-NEAR_BEATS:])
        kernel = _heard_at_zero(self._after[:NEAR_BEATS])
        return Silence(self._jump[0] - began, kernel - began, self._after[0].clock + kernel - began)

    def _listen(self) -> None:
        try:
            self._machine.wait("the heart in the next kernel", JUMP_SECONDS, self._hear)
        except BaseException as error:  # noqa: BLE001 - it is raised where the silence is asked for
            self._error = error

    def _hear(self) -> bool | None:
        """Note what is new; true when enough beats came after the jump."""
        now, text = time.monotonic(), self._machine.console()
        if self._jump is None and (place := text.find(JUMP, self._since)) >= 0:
            self._jump = now, place
        for found in BEAT.finditer(text, self._since):
            came_after = self._jump is not None and found.start() > self._jump[1]
            (self._after if came_after else self._before).append(Beat(int(found[1]), now, float(found[2])))
            self._since = found.end()
        return True if len(self._after) >= NEAR_BEATS else None


def _heard_at_zero(beats: Sequence[Beat]) -> float:
    """Return what the witness's clock was when the guest's was 0."""
    return min(beat.heard - beat.clock for beat in beats)
