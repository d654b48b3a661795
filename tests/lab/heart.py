# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a guest: a producer whose clients see every 10 ms, on the serial line, that it works.

Its beats are numbered lines. With `freeze` they end, and with `finish` in the next kernel they go on with the next
number, which it kept with 64 MiB of state in a memfd.
"""

import os
import struct
import sys
import threading

import systemd.daemon

from khod.producer import Producer, Step, Veto

STATE_BYTES = 64 << 20
BEAT_SECONDS = 0.01
COUNT = struct.Struct("<Q")


class Heart:
    """Beats while it may; the last number is at the begin of its memfd."""

    def __init__(self) -> None:
        self.memfd = -1
        self.may_beat = threading.Event()
        self.is_beating = threading.Lock()

    def begin_empty(self) -> None:
        self.memfd = os.memfd_create("heart")
        os.posix_fallocate(self.memfd, 0, STATE_BYTES)
        self.may_beat.set()

    def prepare(self, _step: Step) -> dict[str, int]:
        return {"state": self.memfd}

    def freeze(self, _step: Step) -> None:
        self.may_beat.clear()
        with self.is_beating:
            pass

    def thaw(self, _step: Step) -> None:
        self.may_beat.set()

    def restore(self, step: Step) -> None:
        if "state" not in step.files:
            raise Veto("its memfd did not come back")
        self.memfd = step.files["state"]

    def finish(self, _step: Step) -> None:
        self.may_beat.set()

    def beat_for_ever(self, line: int) -> None:
        pause = threading.Event()
        while True:
            self.may_beat.wait()
            with self.is_beating:
                if self.may_beat.is_set():
                    (count,) = COUNT.unpack(os.pread(self.memfd, COUNT.size, 0))
                    os.pwrite(self.memfd, COUNT.pack(count + 1), 0)
                    os.write(line, b"\n~%d~\n" % (count + 1))
            pause.wait(BEAT_SECONDS)


def main() -> None:
    heart = Heart()
    handlers = {verb: getattr(heart, verb) for verb in ("prepare", "freeze", "thaw", "restore", "finish")}
    Producer("heart", **handlers).start()
    if heart.memfd < 0:
        heart.begin_empty()
    systemd.daemon.notify("READY=1")
    heart.beat_for_ever(os.open(sys.argv[1], os.O_WRONLY | os.O_NOCTTY))


if __name__ == "__main__":
    main()
