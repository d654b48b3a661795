# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a guest: a service whose clients see every 10 ms, on the serial line, that it works.

    heart LINE finish|restore|store

Its beats are numbered lines, each with the kernel's CLOCK_MONOTONIC; the last number is kept with 64 MiB of state in a
memfd. As a producer of khod's it beats until `freeze`, and goes on with the next number at `finish` or at `restore`.
It answers each of them after a beat: the last one before the jump lies in the `freeze`, and the first one after it in
the `finish` or `restore`. With `store` it has no khod: the service manager keeps the memfd, and it beats until SIGTERM.
"""

import os
import signal
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

import systemd.daemon

if TYPE_CHECKING:
    from khod.producer import Step

STATE_BYTES = 64 << 20
BEAT_SECONDS = 0.01
COUNT = struct.Struct("<Q")


class Heart:
    """Beats while it may; the last number is at the begin of its memfd."""

    def __init__(self, line: str) -> None:
        self.memfd = -1
        self.line = os.open(line, os.O_WRONLY | os.O_NOCTTY)
        self.may_beat = threading.Event()
        self.is_beating = threading.Lock()

    def begin_empty(self) -> None:
        self.memfd = os.memfd_create("heart")
        os.posix_fallocate(self.memfd, 0, STATE_BYTES)
        self.begin()

    def begin(self) -> None:
        """Beat at once, and from now on."""
        with self.is_beating:
            self._beat()
            self.may_beat.set()

    def stop(self) -> None:
        """Beat a last time."""
        with self.is_beating:
            self.may_beat.clear()
            self._beat()

    def beat_for_ever(self) -> None:
        pause = threading.Event()
        while True:
            self.may_beat.wait()
            with self.is_beating:
                if self.may_beat.is_set():
                    self._beat()
            pause.wait(BEAT_SECONDS)

    def _beat(self) -> None:
        (count,) = COUNT.unpack(os.pread(self.memfd, COUNT.size, 0))
        os.pwrite(self.memfd, COUNT.pack(count + 1), 0)
        os.write(self.line, b"\n~%d %.6f~\n" % (count + 1, time.monotonic()))


def take_part(heart: Heart, beats_at: str) -> None:
    """Be a producer of khod's."""
    from khod.producer import Producer, Veto  # noqa: PLC0415 - the service manager's service has no khod

    def prepare(_step: "Step") -> dict[str, int]:
        return {"state": heart.memfd}

    def restore(step: "Step") -> None:
        if "state" not in step.files:
            raise Veto("its memfd did not come back")
        heart.memfd = step.files["state"]
        if beats_at == "restore":
            heart.begin()

    def freeze(_step: "Step") -> None:
        heart.stop()

    def begin(_step: "Step") -> None:
        heart.begin()

    Producer("heart", prepare=prepare, freeze=freeze, thaw=begin, restore=restore, finish=begin).start()
    if heart.memfd < 0:
        heart.begin_empty()
    systemd.daemon.notify("READY=1")
    heart.beat_for_ever()


def stay_in_store(heart: Heart) -> None:
    """Have the service manager keep the memfd over the kexec, and beat until it is stopped."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for fd in systemd.daemon.listen_fds():
        heart.memfd = fd
        heart.begin()
    if heart.memfd < 0:
        heart.begin_empty()
        systemd.daemon.notify("FDSTORE=1\nFDNAME=state", fds=[heart.memfd])
    systemd.daemon.notify("READY=1")
    threading.Thread(target=heart.beat_for_ever, daemon=True).start()
    signal.sigwait({signal.SIGTERM})
    heart.stop()


def main() -> None:
    line, how = sys.argv[1:]
    heart = Heart(line)
    if how == "store":
        stay_in_store(heart)
    else:
        take_part(heart, how)


if __name__ == "__main__":
    main()
