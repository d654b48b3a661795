#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's hands inside a guest: runs commands and moves files for the host.

It speaks newline-delimited JSON over the virtio-serial port PORT and needs nothing but the standard library, neither
network nor udev, so it answers before multi-user.target and almost until the very end of a shutdown.

Agent to host, first line after each start:  {"hello": {"boot_id", "cmdline", "release", "pid"}}
Host to agent:  {"id", "boot_id", "op", ...}
Agent to host:  {"id", "ok": true, ...} or {"id", "ok": false, "error"}

| op | request | reply |
|---|---|---|
| run | argv, stdin (base64), env, timeout (seconds or null) | rc, stdout, stderr (base64) |
| put | path, data (base64), offset, truncate, mode | size |
| get | path, offset, size | data (base64), eof |

A request meant for another boot is dropped: what the host had queued when the guest jumped into its next kernel must
not run there. Either side may find half a line left from before a jump; what is no JSON is skipped.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PORT = "org.khod.lab"
PORT_DEADLINE = 30.0  # seconds for the port to appear; it is there before PID 1 on every kernel of the lab
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

Message = dict[str, Any]


def find_port(root: Path = Path("/")) -> Path | None:
    """Device node of the port called PORT, or None while it does not exist.

    Read from sysfs and devtmpfs, because the link in /dev/virtio-ports is udev's and comes seconds later.
    """
    for name in sorted((root / "sys/class/virtio-ports").glob("*/name")):
        if name.read_text().strip() == PORT:
            node = root / "dev" / name.parent.name
            return node if node.exists() else None
    return None


def open_port() -> int:
    """File descriptor of the port, read and write; TimeoutError after PORT_DEADLINE seconds without one."""
    deadline = time.monotonic() + PORT_DEADLINE
    while (node := find_port()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no virtio-serial port called {PORT}")
        time.sleep(0.02)  # nothing announces the port to a process that runs before udev
    return os.open(node, os.O_RDWR | os.O_CLOEXEC)


def decode(text: str | None) -> bytes:
    """Bytes of a base64 field; none for an absent field."""
    return base64.b64decode(text) if text else b""


def encode(data: bytes) -> str:
    """The base64 field that carries `data`."""
    return base64.b64encode(data).decode("ascii")


def run(request: Message) -> Message:
    """Run argv to its end: {rc, stdout, stderr}; rc is -N for signal N, as in subprocess.

    At the timeout the command's whole process group is killed and TimeoutError raised, with what it had said so far.
    """
    process = subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | request.get("env", {}),
        cwd="/",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(decode(request.get("stdin")), request.get("timeout"))
    except subprocess.TimeoutExpired as late:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        said = f"stdout {out[-500:]!r}, stderr {err[-500:]!r}"
        raise TimeoutError(f"still running after {late.timeout} s; {said}") from late
    return {"rc": process.returncode, "stdout": encode(out), "stderr": encode(err)}


def put(request: Message) -> Message:
    """Write data at an offset of a file: {size} after it. Directories above are made; a new file gets the mode."""
    path = Path(request["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if request.get("truncate") else 0)
    fd = os.open(path, flags, request.get("mode", 0o644))
    with os.fdopen(fd, "wb") as file:
        file.seek(request.get("offset", 0))
        file.write(decode(request["data"]))
    return {"size": path.stat().st_size}


def get(request: Message) -> Message:
    """Read up to size bytes at an offset: {data, eof}.

    Read to its end and not by its size, since debugfs and sysfs files tell stat(2) nothing.
    """
    with open(request["path"], "rb", buffering=0) as file:
        if offset := request.get("offset", 0):
            file.seek(offset)
        data = b""
        while len(data) < request["size"] and (more := file.read(request["size"] - len(data))):
            data += more
    return {"data": encode(data), "eof": len(data) < request["size"]}


OPERATIONS = {"run": run, "put": put, "get": get}


class Agent:
    """One open port, the boot it belongs to, and the requests in flight on it."""

    def __init__(self, fd: int, boot_id: str) -> None:
        """Serve the port `fd`; requests that do not name `boot_id` are not ours."""
        self.fd = fd
        self.boot_id = boot_id
        self._write_lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Write one whole line; its leading newline ends what an agent before the kexec may have left unfinished."""
        line = b"\n" + json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"
        with self._write_lock:
            while line:
                line = line[os.write(self.fd, line) :]

    def answer(self, request: Message) -> None:
        """Do one request and send its reply; every failure of the operation becomes an error reply."""
        try:
            reply = OPERATIONS[request["op"]](request)
        except (OSError, KeyError, TypeError, ValueError) as error:
            self.send({"id": request.get("id"), "ok": False, "error": f"{type(error).__name__}: {error}"})
        else:
            self.send({"id": request.get("id"), "ok": True, **reply})

    def accept(self, line: bytes) -> None:
        """Start the request on one line in a thread of its own; a torn or foreign line is dropped."""
        try:
            request = json.loads(line)
        except ValueError:
            return
        if isinstance(request, dict) and request.get("boot_id") == self.boot_id:
            threading.Thread(target=self.answer, args=(request,), daemon=True).start()

    def serve(self) -> None:
        """Say hello, then answer for as long as the system runs."""
        uname = os.uname()
        cmdline = Path("/proc/cmdline").read_text().strip()
        self.send(
            {"hello": {"boot_id": self.boot_id, "cmdline": cmdline, "release": uname.release, "pid": os.getpid()}}
        )
        rest = b""
        while True:
            data = os.read(self.fd, 1 << 16)
            if not data:  # the host's side is closed: nobody will ever ask again
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.accept(line)


def main() -> int:
    """Serve the port until the host closes it; the exit status is 0."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    Agent(open_port(), boot_id).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
