# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a guest as some user: tries what may be forbidden, and prints what came of each attempt, as JSON.

An outcome is `done`, the name of an errno, khod's error with its cause, or the exit code and what a program said.
"""

import ctypes
import errno
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from khod import wire
from khod.client.connection import Connection
from khod.errors import KhoError

READERS = {"Status", "Producers", "Scratch", "Check", "Plan", "History", "Chain"}
"""Methods that every user may call; Monitor is one too, and never ends."""
NASTY = "\x1b[2J\x1b]0;x\x07\r\nidle: all is well\u202e" * 10_000
ASK = b'{"method": "io.kho.Handover.Status"}\0'
CONNECTIONS = 70
"""A few more than access.max_connections_per_user."""
ASKERS = 8
SHARED = Path("/run/shared")
NOTIFY = "/run/systemd/notify"
CLAIMS = ("READY=1", "STOPPING=1", "STATUS=hostile", "WATCHDOG=trigger", "MAINPID={pid}", "FDSTORE=1\nFDNAME=hostile")
PTRACE_ATTACH = 16
Outcomes = dict[str, str]


def outcome(work: Callable[..., object], *args: Any) -> str:
    """Do the work and say how it ended."""
    try:
        work(*args)
    except KhoError as error:
        return f"{type(error).__name__} {error.cause}".strip()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def call(method: str, parameters: Mapping[str, Any] | None = None, **options: Any) -> Mapping[str, Any]:
    with Connection() as connection:
        connection.send_call(method, parameters, **options)
        return connection.receive_reply()


def try_methods() -> Outcomes:
    """Call every method that the interfaces describe, and those that take an image with one."""
    found = {}
    for interface in (wire.INTERFACE, wire.PRODUCER):
        described = call(f"{wire.SERVICE}.GetInterfaceDescription", {"interface": interface})["description"]
        for name in re.findall(r"^method (\w+)", described, re.MULTILINE):
            if name != "Monitor":
                found[name] = outcome(call, f"{interface}.{name}")
    with open("/dev/null", "rb") as image:

        def give_image(name: str) -> None:
            call(f"{wire.INTERFACE}.{name}", {"kernel": {"image": 0}}, fds=(image.fileno(),))

        for name in ("Check", "Plan"):
            found[f"{name} an image"] = outcome(give_image, name)
    return found


def try_file(path: Path, own: Path) -> Outcomes:
    """Read, change, link, move and replace one file; `own` is the user's directory in the same file system."""
    new = Path(tempfile.mkdtemp(dir=own))
    (new / "new").touch()

    def read() -> None:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
        elif path.is_dir():
            os.listdir(path)
        else:
            path.read_bytes()

    works: dict[str, Callable[[], object]] = {
        "read": read,
        "write": lambda: (path / "new").touch() if path.is_dir() else path.is_socket() or path.open("ab"),
        "mode": lambda: path.chmod(0o777),
        "times": lambda: os.utime(path, (0, 0)),
        "symlink": lambda: path.with_name(f"{path.name}.hostile").symlink_to("/etc/passwd"),
        "fifo": lambda: os.mkfifo(path.with_name(f"{path.name}.fifo")),
        "link": lambda: (new / "link").hardlink_to(path),
        "move": lambda: path.rename(new / "moved"),
        "replace": lambda: (new / "new").rename(path),
        "remove": lambda: path.rmdir() if path.is_dir() else path.unlink(),
    }
    found = {name: outcome(work) for name, work in works.items()}
    if path.is_socket():
        del found["write"]
    return found


def try_process(pid: int) -> Outcomes:
    """Signal, limit, read and trace one process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def trace() -> None:
        if libc.ptrace(PTRACE_ATTACH, pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")

    works: dict[str, Callable[[], object]] = {
        "output": lambda: os.open(f"/proc/{pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK),
        "memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR),
        "environment": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
        "limit": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8)),
        "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "processor": lambda: os.sched_setaffinity(pid, {0}),
        "trace": trace,
        "pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGTERM),
        "signal 0": lambda: os.kill(pid, 0),
        "SIGSTOP": lambda: os.kill(pid, signal.SIGSTOP),
        "SIGKILL": lambda: os.kill(pid, signal.SIGKILL),
    }
    return {name: outcome(work) for name, work in works.items()}


def try_own_process() -> Outcomes:
    """The same with a process of the user's own."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as own:
        assert own.stdin is not None
        assert own.stdout is not None
        # Popen returns when exec closes a pipe, before the kernel lets the user open its files in /proc (EACCES, seen).
        own.stdin.write(b"x")
        own.stdout.read(1)
        return try_process(own.pid)


def try_notify(khod: int) -> Outcomes:
    """Claim what khod alone may say to its service manager, as this process and with khod's credentials."""

    def send(text: str, *, forged: bool = False) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, open("/dev/zero", "rb") as file:
            sock.connect(NOTIFY)
            who = struct.pack("3i", khod, os.getuid(), os.getgid())
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file.fileno()))
            credentials = (socket.SOL_SOCKET, 2, who)  # SCM_CREDENTIALS
            sock.sendmsg([text.encode()], [rights] * ("FDSTORE" in text) + [credentials] * forged)

    claims = [claim.format(pid=os.getpid()) for claim in CLAIMS]
    own = {claim: outcome(send, claim) for claim in claims}
    return own | {"forged": outcome(lambda: send("STATUS=forged", forged=True))}


def try_commands(commands: list[list[str]]) -> Outcomes:
    """Run programs."""
    found = {}
    for command in commands:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        found[" ".join(command)] = f"{ended.returncode} {said[0] if said else ''}".strip()
    return found


def try_all(spec: dict[str, Any]) -> dict[str, Any]:
    """Everything of `spec`, by family."""
    return {
        "methods": try_methods(),
        "files": {path: try_file(Path(path), Path(own)) for path, own in spec["files"].items()},
        "groups": {path: outcome(os.open, path, os.O_WRONLY) for path in spec["groups"]},
        "processes": {name: try_process(pid) for name, pid in spec["processes"].items()},
        "own process": try_own_process(),
        "notify": try_notify(spec["processes"]["khod"]),
        "commands": try_commands(spec["commands"]),
    }


def register(name: str, connection: Connection | None = None, **terms: Any) -> Connection:
    connection = connection or Connection()
    connection.send_call(f"{wire.PRODUCER}.Register", {"name": name, "version": 1, **terms})
    connection.receive_reply()
    return connection


def next_command(connection: Connection, **answer: Any) -> Mapping[str, Any]:
    connection.send_call(f"{wire.PRODUCER}.Next", answer)
    return connection.receive_reply()


def try_producer(spec: dict[str, Any]) -> Outcomes:
    """What a member of kho-producers may try with its right: others' names, too much of everything."""
    kept = []

    def keep(name: str, **terms: Any) -> None:
        kept.append(register(name, **terms))

    def twice() -> None:
        register("other", kept[0])

    def unregistered() -> None:
        call(f"{wire.PRODUCER}.Next", {"serial": 1, "answer": "ready"})

    def forged() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(wire.SOCKET)
            sock.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, struct.pack("3i", 1, 0, 0))])

    found = {name: outcome(keep, name) for name in spec["names"]}
    found |= {
        name: outcome(lambda terms=terms: keep(**{"name": "wrong", **terms}))
        for name, terms in {
            "a name that moves the cursor": {"name": "\x1b[2J"},
            "33 names": {"after": ["x"] * 33},
            "a name of two lines": {"before": ["x\nidle"]},
            "no device": {"devices": ["/etc/shadow"]},
            "an endless timeout": {"timeout": 1e9},
            "an owner": {"owner": {"uid": 0, "unit": "kho-handover.service"}},
        }.items()
    }
    found |= {work.__name__: outcome(work) for work in (unregistered, forged)}
    if kept:
        found["twice"] = outcome(twice)
        found["a mebibyte"] = outcome(lambda: next_command(kept[0], reason="x" * (1 << 20)))
    return found


def tell(name: str) -> None:
    SHARED.joinpath(name).write_text("yes")


def wait_for(name: str) -> None:
    while not SHARED.joinpath(name).exists():
        time.sleep(0.05)


def be_theirs() -> None:
    """A good producer until freeze, when it loses its connection and lives on."""
    connection = register("theirs", timeout=100)
    tell("registered")
    command = next_command(connection)
    tell("preparing")
    wait_for("go")
    next_command(connection, serial=command["serial"], answer="ready")
    connection.close()
    tell("left")
    time.sleep(600)


def be_rude() -> None:
    """A producer whose words are no text for a terminal, and too long."""
    connection = register("rude", timeout=100, devices=["/dev/\x1b[2J"])
    tell("registered")
    command = next_command(connection)
    next_command(connection, serial=command["serial"], answer="not_yet", reason=NASTY, progress=0.5)
    tell("preparing")
    wait_for("go")
    next_command(connection, serial=command["serial"], answer="veto", reason=NASTY)


def flood(count: int) -> Outcomes:
    """Register one more than `count` producers, then ask on all the connections there may be, until it is enough."""
    kept: list[Connection] = []
    ends = [outcome(lambda number=number: kept.append(register(f"many-{number}"))) for number in range(count + 1)]
    held = []
    for number in range(CONNECTIONS):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(wire.SOCKET)
        with suppress(OSError):  # one too many is hung up on
            sock.sendall(ASK * 20 + (b'{"method": "' + b"x" * 1000) * (number >= ASKERS))
        held.append(sock)
    tell("flooding")

    def ask(sock: socket.socket) -> None:
        with suppress(OSError):
            while sock.recv(1 << 16):
                sock.sendall(ASK)

    for sock in held[:ASKERS]:
        threading.Thread(target=ask, args=(sock,), daemon=True).start()
    wait_for("enough")
    gone = sum(1 for sock in held[ASKERS:] if not sock.recv(1, socket.MSG_PEEK))
    return {"registered": str(len(kept)), "last": ends[-1], "gone": str(gone)}


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    match mode:
        case "all":
            print(json.dumps(try_all(json.loads(words[0]))))
        case "producer":
            print(json.dumps(try_producer(json.loads(words[0]))))
        case "flood":
            print(json.dumps(flood(int(words[0]))))
        case "theirs":
            be_theirs()
        case "rude":
            be_rude()
