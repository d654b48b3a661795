# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod and khoctl as processes: khod speaks to a notification socket of ours, so every wait is for its word."""

import json
import os
import pty
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from typer.testing import CliRunner

from khoctl.app import app
from khod.handover.record import Record, Store
from khod.simulated.kernel import SimulatedKernel

REPOSITORY = Path(__file__).parents[2]
DEADLINE = 20.0  # seconds for one word of khod's, or for its end
NOBODY = 65534


@dataclass(frozen=True)
class Answer:
    """What one khoctl ended in."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


class Khod:
    """One khod on the embedded kernel, its files below `directory`. SIGKILLed at the end, unless it is gone."""

    def __init__(self, directory: Path, *, ready: bool = True) -> None:
        self.directory = directory
        self.socket = directory / "socket"
        (directory / "state").mkdir(exist_ok=True)
        (directory / "root/etc/kho").mkdir(parents=True, exist_ok=True)
        self.errors = directory / "stderr"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = directory / "notify"
        address.unlink(missing_ok=True)
        self._notify.bind(str(address))
        self._words: queue.Queue[str] = queue.Queue()
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                self.command(),
                cwd=REPOSITORY,
                env={**os.environ, "NOTIFY_SOCKET": str(address), "PYTHONPATH": str(REPOSITORY)},
                stderr=errors,
            )
        if ready:
            self.word("READY=1")

    def command(self) -> list[str]:
        below = {name: self.directory / name for name in ("root", "state", "socket")}
        flags = [f"--{name}={path}" for name, path in below.items()]
        return [sys.executable, "-m", "khod", *flags, f"--simulate={self.directory / 'kernel'}"]

    def word(self, wanted: str) -> str:
        """Wait until khod tells the service manager something with `wanted` in it."""
        while wanted not in (said := self._words.get(timeout=DEADLINE)):
            pass
        return said

    def _hear(self) -> None:
        """Listen as systemd does, all the time: the socket's queue is short, and a full one would block khod."""
        while said := self._notify.recv(4096):
            self._words.put(said.decode())

    @property
    def kernel(self) -> SimulatedKernel:
        return SimulatedKernel(self.directory / "kernel")

    @property
    def active(self) -> bool:
        return self.kernel.read_file("/sys/kernel/kho/active") == b"1\n"

    @property
    def loaded(self) -> bool:
        return self.kernel.read_file("/sys/kernel/kexec_loaded") == b"1\n"

    @property
    def record(self) -> Record:
        record = Store(self.directory / "state").read()
        assert record is not None
        return record

    @property
    def resident(self) -> int:
        """Bytes of memory the process has resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    def khoctl(self, *words: str | Path) -> "Answer":
        return cli(self.socket, *words)

    def ask(self, method: str, *, files: Sequence[int] = (), **parameters: object) -> dict[str, Any]:
        """Call a method of the interface, as root; its reply's parameters."""
        with self.connect() as client:
            answer = call(client, method, files=files, **parameters)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["parameters"]
        return found

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.socket))
        client.settimeout(DEADLINE)
        return client

    def connect_as(self, user: int) -> socket.socket:
        """Connect as another user, whatever of the path is closed to it."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(DEADLINE)
        self.directory.chmod(0o755)
        directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        os.setegid(user)
        os.seteuid(user)
        try:
            client.connect(f"/proc/self/fd/{directory}/{self.socket.name}")
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.close(directory)
        return client

    @property
    def descriptors(self) -> int:
        """How many the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        """How many the process has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def end(self, number: signal.Signals) -> int:
        """Send a signal that ends it; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def hear_out(self) -> None:
        """Wait for its end, and hear what it sent before that, as systemd does before it starts the next one."""
        self.process.wait(DEADLINE)
        self._notify.shutdown(socket.SHUT_RDWR)  # what is in its queue is still received
        self._hearing.join(DEADLINE)
        assert not self._hearing.is_alive()

    def close(self) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.hear_out()


class Terminal:
    """khoctl on a terminal of its own."""

    def __init__(
        self, khod: Khod, *words: str | Path, columns: int = 80, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.said = ""
        command = [sys.executable, "-m", "khoctl", f"--socket={khod.socket}", *map(str, words)]
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(REPOSITORY)
            os.environ |= {"TERM": "xterm", "COLUMNS": str(columns), **environment}
            os.execv(sys.executable, command)

    def until(self, text: str, times: int = 1) -> None:
        """Read until it has said this so often."""
        while self.said.count(text) < times:
            assert wait_readable(self._fd, DEADLINE), f"{text!r} not within {DEADLINE} s: {self.said!r}"
            self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # EIO: the last one who had the terminal open is gone
            data = b""
        self.said += data.decode()
        return bool(data)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        _pid, code = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(code)


@contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that other users reach; pytest closes its own to them whenever another session begins."""
    with tempfile.TemporaryDirectory(prefix="khod-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def cli(path: Path, *words: str | Path) -> Answer:
    """What `khoctl WORDS` ends in; run in this process, which is 30 times as fast."""
    ended = CliRunner().invoke(app, [f"--socket={path}", *map(str, words)], prog_name="khoctl")
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception  # a traceback, were it a process
    return Answer(ended.exit_code, ended.stdout, ended.stderr)


def khoctl(path: Path, *words: str | Path, user: int | None = None) -> Answer:
    """Run khoctl to its end, as root or another user."""
    return run(["-m", "khoctl", f"--socket={path}", *words], user=user)


def run(arguments: Sequence[str | Path], *, user: int | None = None) -> Answer:
    """Run Python to its end; another user keeps one right, to read: a virtual environment may lie below /root."""
    caps = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    become = [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *caps]
    ended = subprocess.run(
        [*become, sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        check=False,
    )
    return Answer(ended.returncode, ended.stdout, ended.stderr)


def call(client: socket.socket, method: str, *, files: Sequence[int] = (), **parameters: object) -> dict[str, Any]:
    """One Varlink call by hand; the reply's object."""
    name = method if "." in method else f"io.kho.Handover.{method}"
    socket.send_fds(client, [json.dumps({"method": name, "parameters": parameters}).encode() + b"\0"], files)
    return reply(client)


def reply(client: socket.socket) -> dict[str, Any]:
    """One message; {} where the other side hung up before it was whole."""
    message = b""
    while not message.endswith(b"\0"):
        if not (chunk := client.recv(1)):
            return {}
        message += chunk
    found = json.loads(message[:-1])
    assert isinstance(found, dict)
    return found


def hung_up(client: socket.socket) -> bool:
    """Tell whether the other side closes the connection, what it still says notwithstanding."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def wait_readable(fd: int, seconds: float) -> bool:
    """Wait until the file can be read; whether it can. A test may hold more files than select(2) can name."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None, *, seconds: float = DEADLINE) -> None:
    """Poll a condition no one tells of, to a deadline; ends early where the process is gone, None for none."""
    nothing = select.poll()  # of no file: a test may hold more of them than select(2) can name
    for _turn in range(int(seconds / 0.02)):
        if condition():
            return
        assert process is None or process.poll() is None, "the process is gone"
        nothing.poll(20)
    raise AssertionError("the condition did not come true in time")
