# SPDX-License-Identifier: LGPL-2.1-or-later
"""The output of commands, passed on to khod's own output without ever blocking a command, or khod.

khod's output may be gone (EPIPE: journald lost the stream), full (ENOSPC), or not read for any length of time. A thread
of its own writes to each stream; what the stream does not take is dropped, and counted.
"""

import asyncio
import atexit
import fcntl
import os
import select
import sys
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any

READ_BYTES = 1 << 18
"""Bytes that a pipe holds and that one read takes: a large amount of output is read quickly."""
TAIL_BYTES = 4096
"""Bytes at the end of an output in which its last line is searched."""
REST_BYTES = 4 * READ_BYTES
"""Maximum bytes that are read after the command has ended: a child that still has the pipe may write forever."""
LINE_BYTES = 48 << 10
"""Maximum bytes of one line in the journal; a longer line is cut there, as journald does (LineMax=)."""
PASSED_ON_BYTES = 1 << 20
"""Maximum bytes of each output of a command that reach the journal: output that never ends must not fill it."""
PASSED_ON_LINES = 1000
"""Maximum lines of each output, because each is an entry of the journal, which takes 10,000 of a unit within 30 seconds
(RateLimitBurst=) and then drops khod's own messages: yes(1) sent half a million within 1 MiB."""
BUFFER_BYTES = 4 << 20
"""Maximum bytes that wait for a stream that is not read."""
STALL_SECONDS = 1.0
"""Seconds that khod waits at its end for a stream that takes nothing more."""


class Outlet:
    """One of khod's own streams, `stdout` or `stderr`. Writing to it neither blocks nor fails."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[tuple[object, bytes]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, so that none is needed later; if that fails, it is tried again with the next bytes."""
        if self._thread is None:
            thread = threading.Thread(target=self._write_queue, name=f"khod-{self._name}", daemon=True)
            with suppress(RuntimeError):  # can't start new thread
                thread.start()
                self._thread = thread

    def queue_bytes(self, data: bytes) -> None:
        """Queue bytes to be written; they are dropped if too many wait."""
        with self._changed:
            self.start()
            if self._thread is None or self._bytes + len(data) > BUFFER_BYTES:
                self._dropped += len(data)
                return
            self._waiting.append((getattr(sys, self._name), data))
            self._bytes += len(data)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is written or dropped, or until nothing was for STALL_SECONDS."""
        with self._changed:
            while self._bytes and self._changed.wait(STALL_SECONDS):
                pass

    def _write_queue(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                stream, data = self._waiting.popleft()
            written = _write_all(stream, data)
            with self._changed:
                self._dropped += len(data) - written
                dropped = self._dropped if written and not self._waiting else 0
            if dropped:
                line = f"\n(khod dropped {dropped} bytes that commands wrote: its {self._name} did not take them)\n"
                dropped = dropped if _write_all(stream, line.encode()) else 0
            with self._changed:
                self._bytes -= len(data)
                self._dropped -= dropped
                self._changed.notify_all()


def _write_all(stream: Any, data: bytes) -> int:
    """Write to a stream for as long as it takes bytes; return how many it took."""
    written = 0
    # EPIPE, ENOSPC, EIO, EBADF. A stream that was closed later, or was None from the start, has no descriptor.
    with suppress(OSError, ValueError, AttributeError):
        while written < len(data):
            try:
                written += os.write(stream.fileno(), data[written:])
            except BlockingIOError:
                poll = select.poll()
                poll.register(stream.fileno(), select.POLLOUT)
                poll.poll()
    return written


STDOUT = Outlet("stdout")
STDERR = Outlet("stderr")


def start_outlets() -> None:
    """Start the threads that write."""
    STDOUT.start()
    STDERR.start()


@atexit.register
def flush_outlets() -> None:
    """At khod's end, wait for what is not written yet."""
    STDOUT.flush()
    STDERR.flush()


class Output:
    """One output of a command: a pipe that is read in the event loop. `writer` is the command's end of it.

    Each line is passed on after `label`, which says whose output it is.
    """

    def __init__(self, outlet: Outlet, label: str) -> None:
        self._outlet = outlet
        self._label = f"{label}: ".encode()
        self._line = b""
        self._reader, self.writer = os.pipe()
        self._listening = False
        self._tail = b""
        self._read_bytes = 0
        self._passed_bytes = 0
        self._lines_left = PASSED_ON_LINES

    def __enter__(self) -> "Output":
        with suppress(OSError):  # without CAP_SYS_RESOURCE a user's pipes have a limit in total
            fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, READ_BYTES)
        os.set_blocking(self._reader, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_reading()
        self.close_writer()
        os.close(self._reader)

    def close_writer(self) -> None:
        """Close the command's end: the command has its own by now."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def start_reading(self) -> None:
        """Read from now on, whenever there is data."""
        asyncio.get_running_loop().add_reader(self._reader, self._read_once)
        self._listening = True

    def read_rest(self) -> str:
        """Read what is there, at most REST_BYTES, and return the last line of the output.

        What other processes write to the pipe after that is ignored.
        """
        self._stop_reading()
        before = self._read_bytes
        while self._read_once() and self._read_bytes - before < REST_BYTES:
            pass
        if self._line:
            self._pass_on(b"\n")
        if left_out := self._read_bytes - self._passed_bytes:
            self._outlet.queue_bytes(self._label + f"({left_out} bytes more were left out here)\n".encode())
        lines = self._tail.decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def _stop_reading(self) -> None:
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._reader)
            self._listening = False

    def _limit_output(self, chunk: bytes) -> bytes:
        """Return what of a chunk may still be passed on, and count it."""
        allowed = chunk[: PASSED_ON_BYTES - self._passed_bytes]
        *lines, rest = allowed.split(b"\n", self._lines_left)
        if len(lines) == self._lines_left:
            allowed = allowed[: len(allowed) - len(rest)]
        self._lines_left -= len(lines)
        self._passed_bytes += len(allowed)
        return allowed

    def _pass_on(self, data: bytes) -> None:
        """Pass on the lines that are complete."""
        *lines, self._line = (self._line + data).split(b"\n")
        while len(self._line) >= LINE_BYTES:
            lines.append(self._line[:LINE_BYTES])
            self._line = self._line[LINE_BYTES:]
        if lines:
            self._outlet.queue_bytes(b"".join(self._label + line + b"\n" for line in lines))

    def _read_once(self) -> bool:
        """Read once and pass the bytes on; return whether there were any."""
        try:
            chunk = os.read(self._reader, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._stop_reading()
            return False
        if allowed := self._limit_output(chunk):
            self._pass_on(allowed)
        self._read_bytes += len(chunk)
        self._tail = (self._tail + chunk[-TAIL_BYTES:])[-TAIL_BYTES:]
        return True
