"""One QEMU process and its three lines: serial console, QMP and the agent's virtio-serial port.

The lines are socket pairs whose far ends QEMU inherits, so there is no path to agree on, nothing to connect to and no leftover file.
One thread reads all three and wakes whoever waits: no wait of the lab polls or sleeps.
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
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.lab.errors import GuestLost, LabError, WaitTimeout

QEMU = "qemu-system-x86_64"
AGENT_PORT = "org.khod.lab"
TAIL_LINES = 40
PANIC = b"Kernel panic - not syncing"
LAST_WORDS = 2.0  # seconds that a panicking kernel gets to print its trace before the loss is reported
QUIT_DEADLINE = 10.0  # seconds between asking QEMU to end and killing it

T = TypeVar("T")
Json = dict[str, Any]


class Machine:
    """A running QEMU, a context manager; leaving it ends the process.

    `lock` guards everything the reader thread writes and is notified on every change.
    """

    def __init__(self, arguments: Sequence[str], console_log: Path, *, panic_is_loss: bool = True) -> None:
        """Start QEMU with `arguments` plus the three lines; what the console prints also goes to the file `console_log`.

        LabError if there is no QEMU. With `panic_is_loss` false a panic is just text, for scenarios that cause one.
        """
        self.lock = threading.Condition()
        self.started = time.monotonic()
        self.lost: str | None = None
        self.events: list[Json] = []
        self.on_agent_line: Callable[[bytes], None] = lambda line: None
        self._panic_is_loss = panic_is_loss
        self._console = bytearray()
        self._log = console_log.open("wb")
        self._replies: dict[str, Json] = {}
        self._sequence = 0
        self._rest = {"qmp": b"", "agent": b""}
        self._lines: dict[str, socket.socket] = {}
        self._stderr = tempfile.TemporaryFile()
        self._process = self._start(arguments)
        self._reader = threading.Thread(target=self._read, name="lab-reader", daemon=True)

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start QEMU with the far end of each line; the near ends stay in _lines."""
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", *arguments]
        far: list[socket.socket] = []
        for name in ("console", "qmp", "agent"):
            near, other = socket.socketpair()
            self._lines[name] = near
            far.append(other)
            argv += ["-chardev", f"socket,id={name},fd={other.fileno()}"]
        argv += ["-serial", "chardev:console", "-mon", "chardev=qmp,mode=control"]
        argv += ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
        try:
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr,
                                    pass_fds=[end.fileno() for end in far])
        except FileNotFoundError as error:
            raise LabError(f"{QEMU} is not installed: install the packages of tests/lab/packages.txt") from error
        finally:
            for end in far:
                end.close()

    def __enter__(self) -> Self:
        """Begin to read; QMP commands work from here on."""
        self._reader.start()
        self.qmp("qmp_capabilities")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End QEMU: ask, and kill it if it does not go within QUIT_DEADLINE."""
        self.close()

    def close(self) -> None:
        """End this QEMU and no other. May be called again."""
        self._process.terminate()
        try:
            self._process.wait(QUIT_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._reader.is_alive():
            self._reader.join(QUIT_DEADLINE)
        for line in self._lines.values():
            line.close()
        self._log.close()
        self._stderr.close()

    # -- what the lines say -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """The reader thread: hand on what comes in on any line until QEMU closes QMP."""
        with selectors.DefaultSelector() as selector:
            for name, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select():
                    name = key.data
                    try:
                        data = self._lines[name].recv(1 << 16)
                    except OSError:
                        data = b""
                    if not data:
                        selector.unregister(key.fileobj)
                    with self.lock:
                        self._take(name, data)
                        self.lock.notify_all()

    def _take(self, name: str, data: bytes) -> None:
        """Sort new bytes of one line into the state; no bytes mean that QEMU closed it."""
        if name == "console":
            self._take_console(data)
        elif data:
            *lines, self._rest[name] = (self._rest[name] + data).split(b"\n")
            for line in lines:
                (self._take_qmp if name == "qmp" else self.on_agent_line)(line)
        elif name == "qmp" and self.lost is None:
            self.lost = "QEMU ended"

    def _take_console(self, data: bytes) -> None:
        """Keep console output and look for a panic in it, also in one that came in two pieces."""
        start = max(0, len(self._console) - len(PANIC))
        self._console += data
        self._log.write(data)
        self._log.flush()
        if self._panic_is_loss and self.lost is None and PANIC in self._console[start:]:
            self.lost = "the kernel panicked"

    def _take_qmp(self, line: bytes) -> None:
        """Sort one QMP message into events and replies; the greeting is neither."""
        message: Json = json.loads(line)
        if "event" in message:
            self.events.append(message)
        elif "id" in message:
            self._replies[message["id"]] = message

    # -- what the host does -------------------------------------------------------------------------------------------

    def send_agent(self, message: Json) -> None:
        """Send one line to the agent; GuestLost if QEMU is gone."""
        self._send("agent", message)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and give what it returns; underscores in argument names become the dashes QMP uses.

        LabError when QEMU refuses it, GuestLost when there is no QEMU any more.
        """
        with self.lock:
            self._sequence += 1
            number = f"lab-{self._sequence}"
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._send("qmp", {"execute": command, "arguments": dashed, "id": number})
        reply = self.wait(f"the reply to QMP {command}", 30, lambda: self._replies.pop(number, None))
        if "error" in reply:
            raise LabError(f"QMP {command} {dashed}: {reply['error']['desc']}")
        return reply["return"]

    def _send(self, name: str, message: Json) -> None:
        """Write one JSON line to QEMU."""
        try:
            self._lines[name].sendall(json.dumps(message).encode("ascii") + b"\n")
        except OSError as error:
            with self.lock:
                self.lost = self.lost or f"QEMU closed its {name} line"
            raise self._loss(f"sending on the {name} line") from error

    def wait(self, condition: str, timeout: float, probe: Callable[[], T | None]) -> T:
        """Wait until `probe`, called with the lock held after every change, gives something other than None; give that.

        WaitTimeout, naming `condition`, after `timeout` seconds; GuestLost as soon as the guest is gone.
        """
        with self.lock:
            deadline = time.monotonic() + timeout
            while (found := probe()) is None:
                if self.lost:
                    raise self._loss(condition)
                if (left := deadline - time.monotonic()) <= 0:
                    raise WaitTimeout(f"waited {timeout:g} s for {condition}\n{self.tail()}")
                self.lock.wait(left)
            return found

    def _loss(self, condition: str) -> GuestLost:
        """The error for a lost guest, after its last words have come in."""
        with self.lock:
            self.lock.wait_for(lambda: self._count("RESET") or not self._reader.is_alive(), LAST_WORDS)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        return GuestLost(f"{self.lost} while waiting for {condition}\n{said}\n{self.tail()}")

    def _count(self, event: str) -> int:
        """How many QMP events of this name came so far."""
        return sum(1 for message in self.events if message["event"] == event)

    def age(self) -> float:
        """Seconds since QEMU was started."""
        return time.monotonic() - self.started

    @property
    def resets(self) -> int:
        """How often the machine was reset. A kexec is no reset, so this tells the two apart from outside the guest."""
        with self.lock:
            return self._count("RESET")

    def console(self) -> str:
        """Everything that the serial console has printed."""
        with self.lock:
            return self._console.decode(errors="replace").replace("\r\n", "\n")

    def wait_console(self, pattern: str, timeout: float, *, since: int = 0) -> re.Match[str]:
        """Wait until the console's text, from character `since` on, matches the regular expression; give the match."""
        compiled = re.compile(pattern, re.MULTILINE)
        return self.wait(f"{pattern!r} on the console", timeout, lambda: compiled.search(self.console(), since))

    def tail(self) -> str:
        """The console's last lines, with a heading, for error messages."""
        return "\n".join([f"--- last lines of {self._log.name} ---", *self.console().splitlines()[-TAIL_LINES:]])
