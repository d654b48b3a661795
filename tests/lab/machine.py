# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QEMU process and its three lines: serial console, QMP and the agent's virtio-serial port.

The lines are socket pairs whose far ends QEMU inherits: no path to agree on, nothing to connect to, nothing left over.
One thread reads all three and wakes whoever waits, so no wait of the lab polls or sleeps.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.lab.errors import GuestLost, LabError, WaitTimeout

QEMU = "qemu-system-x86_64"
AGENT_PORT = "org.khod.lab"
LINES = ("console", "qmp", "agent")
TAIL_LINES = 40
PANIC = b"Kernel panic - not syncing"
LAST_WORDS = 2.0  # seconds that a panicking kernel gets to print its trace before the loss is reported
SEND_DEADLINE = 60.0  # seconds for QEMU to take a message; a guest in the middle of a kexec takes none
QMP_DEADLINE = 30.0  # seconds
QUIT_DEADLINE = 10.0  # seconds between asking QEMU to end and killing it

T = TypeVar("T")
Json = dict[str, Any]


class Machine:
    """A running QEMU, a context manager; leaving it ends the process.

    `lock` guards everything the reader thread writes and is notified on every change.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        console_log: Path,
        *,
        panic_is_loss: bool = True,
        on_agent_line: Callable[[bytes], object] = bytes,
        before: bytes = b"",
    ) -> None:
        """Describe the machine; what its console prints also goes to the file `console_log`.

        With `panic_is_loss` false a panic is just text, for scenarios that cause one. `on_agent_line` is called for
        each line from the agent, in the reader thread with the lock held. `before` is what the console said in the
        QEMU that this one goes on from.
        """
        self.lock = threading.Condition()
        self.lost: str | None = None
        self.console_log = console_log
        self._arguments = tuple(arguments)
        self._panic_is_loss = panic_is_loss
        self._on_agent_line = on_agent_line
        self._console = bytearray(before)
        self._events: list[Json] = []
        self._replies: dict[str, Json] = {}
        self._sequence = 0
        self._rest = {"qmp": b"", "agent": b""}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start QEMU; the QMP commands work from here on. LabError if it is not installed, GuestLost if it refuses."""
        with ExitStack() as stack:
            self._log = stack.enter_context(self.console_log.open("wb"))
            self._log.write(self._console)
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            near, far = self._socket_pairs(stack)
            self._lines = near
            self._started = time.monotonic()
            self._process = self._start(far)
            self._reader = threading.Thread(target=self._read, name="lab-reader", daemon=True)
            self._reader.start()
            stack.callback(self._end)
            self.qmp("qmp_capabilities")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End this QEMU and no other: ask it, and kill it if it does not go within QUIT_DEADLINE."""
        self._stack.close()

    def _socket_pairs(self, stack: ExitStack) -> tuple[dict[str, socket.socket], dict[str, socket.socket]]:
        """Make a socket pair for each of LINES: our ends and QEMU's."""
        near, far = {}, {}
        for name in LINES:
            near[name], far[name] = (stack.enter_context(end) for end in socket.socketpair())
            near[name].settimeout(SEND_DEADLINE)
        return near, far

    def _start(self, far: dict[str, socket.socket]) -> subprocess.Popen[bytes]:
        """Start QEMU with its ends of the lines, and close them here so that its death closes the lines."""
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", *self._arguments]
        for name, end in far.items():
            argv += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        argv += [
            "-serial",
            "chardev:console",
            "-mon",
            "chardev=qmp,mode=control",
            "-device",
            "virtio-serial-pci",
            "-device",
            f"virtserialport,chardev=agent,name={AGENT_PORT}",
        ]
        try:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[end.fileno() for end in far.values()],
            )
        except FileNotFoundError as error:
            raise LabError(f"{QEMU} is not installed: see tests/lab/packages.txt") from error
        finally:
            for end in far.values():
                end.close()

    def _end(self) -> None:
        """End the process and the thread that listens to it."""
        self._process.terminate()
        try:
            self._process.wait(QUIT_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(QUIT_DEADLINE)

    # -- what the lines say -------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Hand on what comes in on any line until QEMU has closed them all. This is the reader thread."""
        try:
            with selectors.DefaultSelector() as selector:
                for name, line in self._lines.items():
                    selector.register(line, selectors.EVENT_READ, name)
                while selector.get_map():
                    for key, _ in selector.select():
                        data = _receive(self._lines[key.data])
                        if not data:
                            selector.unregister(key.fileobj)
                        with self.lock:
                            self._take(key.data, data)
                            self.lock.notify_all()
        finally:
            with self.lock:  # also if a bug ended this thread: nobody may wait for news that cannot come
                self.lost = self.lost or "the lab's reader ended"
                self.lock.notify_all()

    def _take(self, name: str, data: bytes) -> None:
        """Sort new bytes of one line into the state; no bytes mean that QEMU closed it."""
        if name == "console":
            self._take_console(data)
        elif data:
            *lines, self._rest[name] = (self._rest[name] + data).split(b"\n")
            for line in lines:
                (self._take_qmp if name == "qmp" else self._on_agent_line)(line)
        elif name == "qmp":
            self.lost = self.lost or "QEMU ended"

    def _take_console(self, data: bytes) -> None:
        """Keep console output and look for a panic in it, also for one that came in two pieces."""
        start = max(0, len(self._console) - len(PANIC))
        self._console += data
        self._log.write(data)
        self._log.flush()
        if self._panic_is_loss and PANIC in self._console[start:]:
            self.lost = self.lost or "the kernel panicked"

    def _take_qmp(self, line: bytes) -> None:
        """Sort one QMP message into events and replies; the greeting is neither."""
        message: Json = json.loads(line)
        if "event" in message:
            self._events.append(message)
        elif "id" in message:
            self._replies[message["id"]] = message

    # -- what the host does ---------------------------------------------------------------------------------------

    def send(self, line: str, message: Json) -> None:
        """Write one JSON line to `qmp` or `agent`; GuestLost if QEMU is gone or takes nothing for SEND_DEADLINE."""
        try:
            self._lines[line].sendall(json.dumps(message).encode("ascii") + b"\n")
        except OSError as error:
            with self.lock:
                self.lost = self.lost or f"QEMU takes nothing on its {line} line ({error})"
            raise self._loss(f"room on the {line} line") from error

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and give what it returns; underscores in argument names become the dashes QMP uses.

        LabError when QEMU refuses it, GuestLost when there is no QEMU any more.
        """
        with self.lock:
            self._sequence += 1
            number = f"lab-{self._sequence}"
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send("qmp", {"execute": command, "arguments": dashed, "id": number})
        reply = self.wait(f"the reply to QMP {command}", QMP_DEADLINE, lambda: self._replies.pop(number, None))
        if "error" in reply:
            raise LabError(f"QMP {command} {dashed}: {reply['error']['desc']}")
        return reply["return"]

    def wait_event(self, event: str, timeout: float, **data: Any) -> Json:
        """Wait for a QMP event with these data, from now or before; give all its data."""

        def came() -> Json | None:
            named = (message.get("data", {}) for message in self._events if message["event"] == event)
            return next((found for found in named if data.items() <= found.items()), None)

        return self.wait(f"QEMU's event {event} {data}", timeout, came)

    def wait(self, condition: str, timeout: float, probe: Callable[[], T | None]) -> T:
        """Call `probe`, with the lock held, after every change until it gives something other than None; give that.

        WaitTimeout, naming `condition`, after `timeout` seconds; GuestLost as soon as the guest is gone.
        """
        deadline = time.monotonic() + timeout
        with self.lock:
            while (found := probe()) is None:
                if self.lost:
                    raise self._loss(condition)
                if (left := deadline - time.monotonic()) <= 0:
                    raise WaitTimeout(f"waited {timeout:g} s for {condition}\n{self.tail()}")
                self.lock.wait(left)
            return found

    def _loss(self, condition: str) -> GuestLost:
        """Make the error for a lost guest, after its last words have come in."""
        with self.lock:
            self.lock.wait_for(lambda: self.resets or not self._reader.is_alive(), LAST_WORDS)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        return GuestLost(f"{self.lost} while waiting for {condition}\n{said}\n{self.tail()}")

    def age(self) -> float:
        """Seconds since QEMU was started."""
        return time.monotonic() - self._started

    @property
    def resets(self) -> int:
        """How many RESET events came. A kexec brings none, the reset button two: SeaBIOS resets once more."""
        with self.lock:
            return sum(1 for message in self._events if message["event"] == "RESET")

    def console(self) -> str:
        """Everything that the serial console has printed."""
        with self.lock:
            return self._console.decode(errors="replace").replace("\r\n", "\n")

    def wait_console(self, pattern: str, timeout: float, *, since: int = 0) -> re.Match[str]:
        """Wait until the console's text from character `since` on matches the regular expression; give the match."""
        compiled = re.compile(pattern, re.MULTILINE)
        return self.wait(f"{pattern!r} on the console", timeout, lambda: compiled.search(self.console(), since))

    def tail(self) -> str:
        """Give the console's last lines, with a heading, for error messages."""
        return "\n".join([f"--- last lines of {self.console_log} ---", *self.console().splitlines()[-TAIL_LINES:]])


def _receive(line: socket.socket) -> bytes:
    """Read what is there; nothing if the other end is closed or was killed."""
    try:
        return line.recv(1 << 16)
    except OSError:
        return b""
