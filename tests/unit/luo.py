# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel with LUO for the unit tests, as 7.3.4 was seen to do it, and a service manager that keeps descriptors.

A session is the writing end of a pipe whose reading end the kernel has: it hangs up when the last process closes its
descriptor of the session, which is when the real one drops it too. So a session lives in whatever process has it.
`System` is one machine with khods as processes, one after the other; `LuoHost` has them in this process.
"""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from khod import daemon
from khod.abi.liveupdate import LIVEUPDATE
from khod.errors import Exit
from khod.handover.record import Store
from khod.kernel.luo import HUGE_PAGE_BYTES
from khod.model import Event
from khod.simulated import kernel
from khod.simulated.kernel import Rebooted, SimulatedKernel
from tests.unit.harness import Host, Kernel, connect_apart
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, reply, until

SWITCHED_ON = "liveupdate=on"
NAME_SIZE = 64  # LIVEUPDATE_SESSION_NAME_LENGTH, the NUL included
DIES_AT = "KHOD_DIES_AT"
SITE = """\
from tests.unit.luo import settle_in
settle_in()
"""
"""sitecustomize.py of khod's process: its simulated kernel has LUO."""

AS_SYSTEMD = """
import json, os, sys
settings = json.loads(sys.argv[1])
fds = [os.open(path, os.O_WRONLY) for path in settings["store"]]
high = [os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ.update(settings["environment"])
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.executable, [sys.executable, "-m", "khod", *sys.argv[2:]])
"""
"""What systemd's child does between fork and exec; run with -S, so without SITE. Opening a pipe gives the same pipe."""


def refuse(number: int, what: str) -> OSError:
    return OSError(number, os.strerror(number), what)


def identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def is_shmem(fd: int) -> bool:
    """Whether 7.3.4 preserves it: memory without a name, in pages of the usual size."""
    found = os.fstat(fd)
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and found.st_blksize <= HUGE_PAGE_BYTES


def copied(fd: int) -> int:
    """What the next kernel makes of a preserved memfd."""
    made = os.memfd_create("arrived")
    os.ftruncate(made, os.fstat(fd).st_size)
    os.pwrite(made, os.pread(fd, os.fstat(fd).st_size, 0), 0)
    os.lseek(made, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
    return made


@dataclass
class Session:
    """One that somebody has open. `files` are the kernel's own references, by token."""

    name: str
    reader: int
    writer: tuple[int, int]
    incoming: bool
    files: dict[int, int] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    def empty(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])


def close_all(sessions: list[Session], arrived: dict[str, dict[int, int]]) -> None:
    """Have the kernel let go of what it holds, as at its end."""
    for files in arrived.values():
        for fd in files.values():
            os.close(fd)
    for session in sessions:
        session.empty()
        os.close(session.reader)
    arrived.clear()
    sessions.clear()


class FakeLuo:
    """The Live Update Orchestrator of one machine, over its jumps."""

    def __init__(self) -> None:
        self.busy = 0
        """How many calls still find /dev/liveupdate open in another process."""
        self._sessions: list[Session] = []
        self._arrived: dict[str, dict[int, int]] = {}
        self._lock = threading.RLock()
        weakref.finalize(self, close_all, self._sessions, self._arrived)

    @property
    def outgoing(self) -> dict[str, list[int]]:
        """The tokens of each session that would leave with a jump now."""
        with self._at("look"):
            return {session.name: sorted(session.files) for session in self._sessions if not session.incoming}

    @property
    def unclaimed(self) -> set[str]:
        """Sessions of the previous kernel that are not finished: never retrieved, or still open with files in them."""
        with self._at("look"):
            return {*self._arrived, *(session.name for session in self._sessions if session.incoming and session.files)}

    def create_session(self, name: str) -> int:
        with self._at(f"CREATE_SESSION({name!r})", device=True) as what:
            if not name or len(name.encode()) >= NAME_SIZE:
                raise refuse(errno.EINVAL, what)
            if any(session.name == name and not session.incoming for session in self._sessions):
                raise refuse(errno.EEXIST, what)
            return self._opened(name, {}, incoming=False)

    def retrieve_session(self, name: str) -> int:
        with self._at(f"RETRIEVE_SESSION({name!r})", device=True) as what:
            if any(session.name == name and session.incoming for session in self._sessions):
                raise refuse(errno.EINVAL, what)
            if name not in self._arrived:
                raise refuse(errno.ENOENT, what)
            return self._opened(name, self._arrived.pop(name), incoming=True)

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        with self._at(f"SESSION_PRESERVE_FD(token={token:#x})") as what:
            found = self._found(session, what)
            if found.incoming:
                raise refuse(errno.EINVAL, what)
            if token in found.files:
                raise refuse(errno.EEXIST, what)
            if not is_shmem(fd):
                raise refuse(errno.ENOENT, what)
            if any(identity(fd) == identity(kept) for each in self._sessions for kept in each.files.values()):
                raise refuse(errno.EBUSY, what)
            found.files[token] = os.dup(fd)

    def retrieve_fd(self, session: int, token: int) -> int:
        with self._at(f"SESSION_RETRIEVE_FD(token={token:#x})") as what:
            found = self._found(session, what)
            if not found.incoming:
                raise refuse(errno.EINVAL, what)
            if token not in found.files:
                raise refuse(errno.ENOENT, what)
            return os.dup(found.files[token])

    def finish_session(self, session: int) -> None:
        with self._at("SESSION_FINISH()") as what:
            found = self._found(session, what)
            if not found.incoming:
                raise refuse(errno.EINVAL, what)
            found.empty()

    def jump(self, *, cold: bool = False) -> None:
        """The next kernel: what is in open outgoing sessions arrives, with its content as it is now."""
        with self._at("jump"):
            going = [session for session in self._sessions if not session.incoming and not cold]
            arriving = {session.name: {token: copied(fd) for token, fd in session.files.items()} for session in going}
            close_all(self._sessions, self._arrived)
            self._arrived |= arriving

    def _opened(self, name: str, files: dict[int, int], *, incoming: bool) -> int:
        reader, writer = os.pipe()
        self._sessions.append(Session(name, reader, identity(writer), incoming, files))
        return writer

    def _found(self, fd: int, what: str) -> Session:
        found = next((session for session in self._sessions if session.writer == identity(fd)), None)
        if found is None:
            raise refuse(errno.ENOTTY, what)
        return found

    @contextmanager
    def _at(self, what: str, *, device: bool = False) -> Iterator[str]:
        """One call: sessions that all have closed are gone by then."""
        with self._lock:
            for session in [session for session in self._sessions if not session.open]:
                session.empty()
                os.close(session.reader)
                self._sessions.remove(session)
            if device and self.busy:
                self.busy -= 1
                raise refuse(errno.EBUSY, f"open {LIVEUPDATE}")
            yield what


def offer(kernel: SimulatedKernel) -> None:
    """Show the device, and the parameter that switches it on: whether it is there tells a kernel without LUO."""
    kernel.host_path(LIVEUPDATE).parent.mkdir(exist_ok=True)
    kernel.host_path(LIVEUPDATE).touch()
    line = kernel.host_path("/proc/cmdline")
    if SWITCHED_ON not in (words := line.read_text().split()):
        line.write_text(" ".join([*words, SWITCHED_ON]) + "\n")


# In this process


class LuoKernel(Kernel):
    """The harness's kernel with LUO: no real one has v3 and LUO both."""

    def __init__(self, root: Path, store: Store, jumped: Callable[[], None]) -> None:
        super().__init__(root, store)
        self.luo = FakeLuo()
        self._jumped = jumped
        offer(self)

    def create_session(self, name: str) -> int:
        return self.luo.create_session(name)

    def retrieve_session(self, name: str) -> int:
        return self.luo.retrieve_session(name)

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        self.luo.preserve_fd(session, fd, token)

    def retrieve_fd(self, session: int, token: int) -> int:
        return self.luo.retrieve_fd(session, token)

    def finish_session(self, session: int) -> None:
        self.luo.finish_session(session)

    def reboot_kexec(self) -> None:
        try:
            super().reboot_kexec()
        except Rebooted:
            self.luo.jump()
            self._jumped()
            raise


class LuoHost(Host):
    """A host under test whose kernel has LUO. `carries`: its service manager brings the store over the jump."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.carries = False
        self.kernel: LuoKernel = LuoKernel(directory / "kernel", self.store, self._jumped)

    @property
    def luo(self) -> FakeLuo:
        return self.kernel.luo

    def _jumped(self) -> None:
        for name in list(self.fdstore.kept):
            self.fdstore.remove_fd(name)
            if self.carries:
                self.fdstore.kept[name] = self.luo.retrieve_session(name)


# khod as a process


class RemoteKernel(SimulatedKernel):
    """The simulated kernel in khod's process. Its LUO is the test's, which lives on when this one is killed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        offer(self)

    def _ask(self, call: str, *arguments: object, fds: Sequence[int] = ()) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as luo:
            luo.connect(str(self.root.parent / "luo"))
            socket.send_fds(luo, [json.dumps([call, *arguments]).encode()], fds)
            raw, got, _, _ = socket.recv_fds(luo, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        number, what = json.loads(raw)
        if number:
            raise refuse(number, what)
        return got[0] if got else -1

    def create_session(self, name: str) -> int:
        return self._ask("create_session", name)

    def retrieve_session(self, name: str) -> int:
        return self._ask("retrieve_session", name)

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        self._ask("preserve_fd", token, fds=(session, fd))

    def retrieve_fd(self, session: int, token: int) -> int:
        return self._ask("retrieve_fd", token, fds=(session,))

    def finish_session(self, session: int) -> None:
        self._ask("finish_session", fds=(session,))

    def reboot_kexec(self) -> None:
        cold = bool(self._state.faults.get("cold"))
        try:
            super().reboot_kexec()
        except Rebooted:
            self._ask("jump", cold)
            raise


def settle_in() -> None:
    """Give the khod of this process LUO, and SIGKILL it where DIES_AT says: at the first `PHASE: MESSAGE` with that."""
    vars(kernel)["SimulatedKernel"] = RemoteKernel
    wanted, tell = os.environ.get(DIES_AT, ""), daemon.Daemon._on_event

    def dies(self: daemon.Daemon, event: Event) -> None:
        if wanted in f"{event.phase.value}: {event.message}":
            os.kill(os.getpid(), signal.SIGKILL)
        tell(self, event)

    if wanted:
        vars(daemon)["Daemon"] = type("Daemon", (daemon.Daemon,), {"_on_event": dies})


class System:
    """One machine below a directory: LUO, a service manager, and khods, one after the other. A jump kills khod."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.luo = FakeLuo()
        self.kept: dict[str, int] = {}
        """The service manager's store, of the one unit there is."""
        self.carries = False
        """Whether the service manager brings its store over a jump, as `systemctl kexec` does."""
        self.mortal: list[Callable[[], None]] = []
        """What ends with the kernel besides khod: called once in the jump."""
        self._khods: list[Khod] = []
        self._running = threading.Event()
        """Cleared while a jump is under way: khod has been killed, and the next kernel is not there yet."""
        self._running.set()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(str(directory / "luo"))
        self._listening.listen()
        (directory / "site").mkdir()
        (directory / "site/sitecustomize.py").write_text(SITE)
        (directory / "vmlinuz").write_bytes(bzimage())
        (directory / "initrd").write_bytes(CPIO)
        threading.Thread(target=self._serve, daemon=True).start()

    def khod(self, *, dies_at: str = "", ready: bool = True) -> "LuoKhod":
        """Start a khod; it is passed what the store has. With `dies_at` see `settle_in`."""
        assert self._running.wait(DEADLINE)
        if self._khods:
            self._khods[-1].hear_out()
        made = LuoKhod(self, dies_at, ready=ready)
        self._khods.append(made)
        return made

    def jump(self, khod: Khod, *options: str) -> None:
        """Have khod jump into the next kernel. Another khod is still to be started in it."""
        ended = khod.khoctl("kexec", *(options or self.images))
        assert ended.code == Exit.done, ended
        assert khod.process.wait(DEADLINE) == -signal.SIGKILL
        assert self._running.wait(DEADLINE)

    def emptied(self) -> bool:
        """Whether no session is left anywhere; khod tells its service manager, and does not wait for it."""
        until(lambda: (self.kept, self.luo.outgoing, self.luo.unclaimed) == ({}, {}, set()), self._khods[-1].process)
        return True

    def configure(self, text: str) -> None:
        """Write khod.toml."""
        at = self.directory / "root/etc/kho"
        at.mkdir(parents=True, exist_ok=True)
        (at / "khod.toml").write_text(text)

    def hook(self, name: str, text: str) -> None:
        """Write a file of producers.d."""
        at = self.directory / "root/etc/kho/producers.d"
        at.mkdir(parents=True, exist_ok=True)
        (at / f"{name}.toml").write_text(text)

    @property
    def images(self) -> list[str]:
        """The options of `khoctl kexec`."""
        return [f"--image={self.directory / 'vmlinuz'}", f"--initrd={self.directory / 'initrd'}"]

    def close(self) -> None:
        for khod in self._khods:
            khod.close()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._forget()
        self.luo.jump(cold=True)

    def _forget(self) -> None:
        while self.kept:
            os.close(self.kept.popitem()[1])

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client, suppress(OSError):  # it may have been killed meanwhile
                self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        raw, fds, _, _ = socket.recv_fds(client, 4096, 2)
        if not raw:
            return
        call, *arguments = json.loads(raw)
        made: list[int] = []
        try:
            if call == "jump":
                self._jump(cold=arguments[0])
            elif (fd := getattr(self.luo, call)(*fds, *arguments)) is not None:
                made.append(fd)
            answer: list[Any] = [0, ""]
        except OSError as error:
            answer = [error.errno, str(error.filename)]
        finally:
            for fd in fds:
                os.close(fd)
        try:
            socket.send_fds(client, [json.dumps(answer).encode()], made)
        finally:
            for fd in made:
                os.close(fd)

    def _jump(self, *, cold: bool) -> None:
        while self.mortal:
            self.mortal.pop()()
        self._running.clear()
        self._khods[-1].process.kill()
        self._khods[-1].hear_out()
        names = list(self.kept)
        self.luo.jump(cold=cold)
        self._forget()
        if self.carries and not cold:
            self.kept = {name: self.luo.retrieve_session(name) for name in names}
        self._running.set()

    def hear(self, text: str, fds: list[int]) -> None:
        """Do what systemd does with a notification of the unit's main process."""
        said = dict(line.partition("=")[::2] for line in text.splitlines())
        if "FDSTORE" in said and fds:
            self.kept[said["FDNAME"]] = fds.pop()
        if "FDSTOREREMOVE" in said and said["FDNAME"] in self.kept:
            os.close(self.kept.pop(said["FDNAME"]))
        for fd in fds:  # of a BARRIER=1
            os.close(fd)


class LuoKhod(Khod):
    """One khod of a system."""

    def __init__(self, system: System, dies_at: str, *, ready: bool) -> None:
        self._system, self._dies_at = system, dies_at
        super().__init__(system.directory, ready=ready)

    def command(self) -> list[str]:
        system = self._system
        environment = {
            "PYTHONPATH": f"{system.directory / 'site'}:{REPOSITORY}",
            "LISTEN_FDNAMES": ":".join(system.kept),
            DIES_AT: self._dies_at,
        }
        store = [f"/proc/{os.getpid()}/fd/{fd}" for fd in system.kept.values()]
        settings = json.dumps({"environment": environment, "store": store})
        return [sys.executable, "-S", "-c", AS_SYSTEMD, settings, *super().command()[3:]]

    def _hear(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._notify, 4096, 16)
            if not data:
                return
            self._system.hear(data.decode(), list(fds))
            self._words.put(data.decode())

    def listening(self) -> "LuoKhod":
        """Itself, once it answers at its socket: while it waits for peers it is not ready yet."""

        def answers() -> bool:
            try:
                self.connect().close()
            except OSError:
                return False
            return True

        until(answers, self.process)
        return self

    def died(self) -> None:
        """Wait until it was killed where it was to be."""
        assert self.process.wait(DEADLINE) == -signal.SIGKILL, self.errors.read_text()


class Watch:
    """Hears what khod tells, from now on."""

    def __init__(self, khod: Khod) -> None:
        self._client = khod.connect()
        self._client.sendall(b'{"method": "io.kho.Handover.Monitor", "parameters": {}, "more": true}\0')
        reply(self._client)  # how it stands

    def until(self, wanted: str) -> dict[str, Any]:
        """Wait for the first `PHASE: MESSAGE` with this in it."""
        while wanted not in "{phase}: {message}".format(**(event := reply(self._client)["parameters"]["event"])):
            pass
        return dict(event)

    def close(self) -> None:
        self._client.close()


PRODUCER = "io.kho.Producer"


def begin(khod: Khod, method: str, *, files: Sequence[int] = (), **parameters: object) -> socket.socket:
    """Call a method of io.kho.Handover and do not wait: its answer comes in the socket."""
    client = khod.connect()
    call = {"method": f"io.kho.Handover.{method}", "parameters": parameters}
    socket.send_fds(client, [json.dumps(call).encode() + b"\0"], files)
    return client


class Hand:
    """A peer by hand, over one raw connection."""

    def __init__(self, khod: Khod, name: str, **terms: Any) -> None:
        self.socket = self._connect(khod)
        self.fds: list[int] = []
        self.serial = 0
        self.send("Register", **{"name": name, "version": 1, **terms})
        self.registered = self.receive()

    def _connect(self, khod: Khod) -> socket.socket:
        return khod.connect()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method; its parameters, or {"error": NAME, **parameters}."""
        self.send(method, **parameters)
        return self.receive()

    def send(self, method: str, files: Sequence[int] = (), **parameters: Any) -> None:
        message = {"method": f"{PRODUCER}.{method}", "parameters": parameters}
        socket.send_fds(self.socket, [json.dumps(message).encode() + b"\0"], files)

    def receive(self) -> dict[str, Any]:
        """The next reply; ConnectionError where khod hangs up."""
        text = b""
        while not text.endswith(b"\0"):
            data, fds, _, _ = socket.recv_fds(self.socket, 1, 16, socket.MSG_CMSG_CLOEXEC)
            if not data:
                raise ConnectionError(text)
            text += data
            self.fds += fds
        message = json.loads(text[:-1])
        error = {"error": message["error"]} if "error" in message else {}
        return {**error, **message.get("parameters", {})}

    def ready(self, files: Sequence[int] = (), **more: Any) -> None:
        """Say yes to what it was told last, or that it listens, and wait for nothing."""
        said = {"serial": self.serial, "answer": "ready"} if self.serial else {}
        self.send("Next", files, **{**said, **more})

    def told(self) -> str:
        """Wait for the next verb."""
        command = self.receive()
        self.serial = command["serial"]
        return str(command["verb"])

    def follows(self, *verbs: str) -> None:
        """Say yes to the last verb and to all of these as they come, in this order; the last is not answered."""
        for verb in verbs:
            self.ready()
            assert self.told() == verb

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
        self.socket.close()


class Mortal(Hand):
    """A peer with a process of its own: the one that connected, by the kernel's word. It ends with `close`."""

    def _connect(self, khod: Khod) -> socket.socket:
        self._process, client = connect_apart(khod.socket)
        client.settimeout(DEADLINE)
        return client

    def close(self) -> None:
        super().close()
        self._process.end()


def memfd(content: bytes = b"what it holds", flags: int = os.MFD_CLOEXEC) -> int:
    fd = os.memfd_create("table", flags)
    os.pwrite(fd, content, 0)
    return fd


def one_file(fd: int, token: int = 0, name: str = "table") -> dict[str, Any]:
    """The arguments with which a yes hands a file over."""
    return {"files": [fd], "names": [name], "tokens": [token], "fds": [0]}
