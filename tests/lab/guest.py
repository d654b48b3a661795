# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest: a Machine with a disk and the lab's agent on it."""

from __future__ import annotations

import base64
import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.lab.accel import accel as probe_accel
from tests.lab.accel import kernel_words, machine_arguments
from tests.lab.errors import CommandFailed, GuestRebooted, LabError, Result
from tests.lab.kernels import Kernel
from tests.lab.machine import Json, Machine

# Legacy ptys are 256 devices for udev and systemd to look at; the other words save a second, or end a panic at once.
CMDLINE = "console=ttyS0 root=/dev/vda rw panic=-1 mitigations=off pty.legacy_count=0 8250.nr_uarts=1"
GRACE = 20.0  # seconds beyond a command's own timeout until the agent must have answered
BOOT_TIMEOUT = 120.0  # seconds
CHUNK = 1 << 20


def compose_cmdline(accel: str, extra: str) -> str:
    """Return the command line of a guest's kernel; `accel` is kvm or tcg."""
    return " ".join(words for words in (CMDLINE, kernel_words(accel), extra) if words)


@dataclass(frozen=True)
class Hello:
    """What the agent says when it starts: which boot, which kernel.

    `seconds` is when it came, counted from QEMU's start. `how` is how this boot began, as QEMU saw it:
    a kexec is a boot without a reset of the machine.
    """

    boot_id: str
    cmdline: str
    release: str
    pid: int
    seconds: float
    how: Literal["power-on", "reset", "kexec"]


@dataclass(frozen=True)
class Saved:
    """What a guest was when it was saved: QEMU's migration stream, the disk as it was then, the console's text."""

    memory: Path
    disk: Path
    console: Path
    hello: Hello


class Pending:
    """A command on its way in the guest, from Guest.start()."""

    def __init__(self, guest: Guest, number: str, argv: Sequence[str], hello: Hello) -> None:
        """Remember which reply to wait for, and from which agent."""
        self._guest = guest
        self._number = number
        self._argv = tuple(argv)
        self._hello = hello

    def wait(self, timeout: float = 120) -> Result:
        """Give how the command ended; GuestRebooted if its boot ended first, WaitTimeout after `timeout` seconds."""
        reply = self._guest.reply(self._number, " ".join(self._argv), timeout, self._hello)
        return Result(reply["rc"], _text(reply["stdout"]), _text(reply["stderr"]))


class Guest:
    """A booted machine, a context manager: inside it the agent has answered, after it QEMU is gone."""

    def __init__(
        self,
        kernel: Kernel,
        disk: Path,
        *,
        cmdline_extra: str = "",
        memory_mib: int = 1536,
        smp: int = 2,
        accel: str | None = None,
        reboot: bool = True,
        panic_is_loss: bool = True,
        qemu_extra: Sequence[str] = (),
        console_log: Path | None = None,
        drive: str | None = None,
        saved: Saved | None = None,
    ) -> None:
        """Describe the machine; nothing runs before the with statement.

        The disk's image is never written: QEMU keeps what the guest writes in a temporary overlay of its own, through
        kexec and reset, unless `drive` says otherwise. With `reboot` false a reset ends QEMU. `accel` is kvm or tcg,
        probed if not given. `console_log` defaults to a file in a temporary directory. A guest with `saved` does not
        boot but goes on from there: all else must be as it was then (see tests/lab/saved.py).
        """
        self._kernel = kernel
        self._cmdline_extra = cmdline_extra
        self._accel = accel
        self._panic_is_loss = panic_is_loss
        self._console_log = console_log
        self._saved = saved
        kept = f"file={saved.disk},format=qcow2" if saved else f"file={disk},format=raw"
        self._arguments = [
            "-kernel",
            str(kernel.bzimage),
            "-m",
            str(memory_mib),
            "-smp",
            str(smp),
            "-drive",
            f"{drive or f'{kept},snapshot=on'},if=virtio,cache=unsafe",
            *([] if reboot else ["-no-reboot"]),
            *qemu_extra,
            *(["-incoming", f"exec:cat {shlex.quote(str(saved.memory))}"] if saved else []),
        ]
        self._stack = ExitStack()
        self._machine: Machine | None = None
        self._hellos: list[Hello] = []
        self._resets = 0
        self._replies: dict[str, Json] = {}
        self._sequence = 0

    def __enter__(self) -> Self:
        """Start QEMU and wait for the agent; GuestLost or WaitTimeout if it does not come up or go on."""
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="khod-lab-"))
            accel = self._accel or probe_accel(self._kernel)
            cmdline = compose_cmdline(accel, self._cmdline_extra)
            arguments = [*machine_arguments(accel), "-append", cmdline, *self._arguments]
            self._machine = Machine(
                arguments,
                self._console_log or Path(directory) / "console.log",
                panic_is_loss=self._panic_is_loss,
                on_agent_line=self._take,
                before=self._saved.console.read_bytes() if self._saved else b"",
            )
            if self._saved:
                self._hellos.append(self._saved.hello)
            stack.enter_context(self._machine)
            self.wait_hello(BOOT_TIMEOUT)
            if self._saved:  # its clock stood still, the one its next kernel reads did not
                self.run(["true"])  # it is loaded by now: what is set is not late by that
                self.run(["date", "--utc", f"--set=@{time.time()}"])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End QEMU."""
        self._stack.close()

    @property
    def machine(self) -> Machine:
        """The QEMU below; LabError before the guest was started."""
        if self._machine is None:
            raise LabError("the guest is not started: use it as a context manager")
        return self._machine

    # -- boots ----------------------------------------------------------------------------------------------------

    @property
    def hellos(self) -> Sequence[Hello]:
        """Every hello so far, oldest first."""
        with self.machine.lock:
            return tuple(self._hellos)

    @property
    def boot_id(self) -> str:
        """The kernel's boot id in the running boot."""
        return self.hellos[-1].boot_id

    def wait_hello(self, timeout: float) -> Hello:
        """Wait for the agent of the first boot."""
        return self.machine.wait("the agent's first hello", timeout, lambda: next(reversed(self._hellos), None))

    def wait_reboot(self, previous_boot_id: str, timeout: float = BOOT_TIMEOUT) -> Hello:
        """Wait for the agent of another boot than `previous_boot_id`, whatever led there: kexec, reboot or reset."""

        def other() -> Hello | None:
            return self._hellos[-1] if self._hellos[-1].boot_id != previous_boot_id else None

        return self.machine.wait(f"the agent of another boot than {previous_boot_id}", timeout, other)

    def wait_online(self, timeout: float = BOOT_TIMEOUT) -> str:
        """Wait until systemd has finished starting; its word for the state: running, degraded, maintenance."""
        return self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=timeout).stdout.strip()

    def kexec(self, timeout: float = BOOT_TIMEOUT, argv: Sequence[str] = ("systemctl", "kexec")) -> Hello:
        """Run the command that jumps into the loaded kernel, and wait for that kernel's agent."""
        previous = self.boot_id
        self.start(argv)
        return self.wait_reboot(previous, timeout)

    def reset(self, timeout: float = BOOT_TIMEOUT) -> Hello:
        """Press the reset button and wait for the agent: the machine boots its own -kernel, nothing is handed over."""
        previous = self.boot_id
        self.qmp("system_reset")
        return self.wait_reboot(previous, timeout)

    # -- commands and files -----------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 120,
        input: str | bytes | None = None,  # noqa: A002 - as in subprocess.run
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command in the guest to its end.

        CommandFailed on a non-zero exit status with `check`; LabError if it cannot be started or outlives `timeout`
        seconds (it is killed then); GuestRebooted if its boot ends first.
        """
        result = self._command(argv, timeout, input, env).wait(timeout + GRACE)
        if check and result.rc != 0:
            raise CommandFailed(argv, result)
        return result

    def start(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as in subprocess.run
        env: Mapping[str, str] | None = None,
    ) -> Pending:
        """Start a command in the guest and go on; the Pending gives its result later."""
        return self._command(argv, None, input, env)

    def _command(
        self,
        argv: Sequence[str],
        timeout: float | None,
        data: str | bytes | None,
        env: Mapping[str, str] | None,
    ) -> Pending:
        """Send one run request."""
        raw = data.encode() if isinstance(data, str) else data or b""
        number, hello = self._request(
            "run", argv=list(argv), timeout=timeout, env=dict(env or {}), stdin=base64.b64encode(raw).decode("ascii")
        )
        return Pending(self, number, argv, hello)

    def put(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file in the guest, directories above it included; LabError if it cannot be written."""
        raw = data.encode() if isinstance(data, str) else data
        for offset in range(0, max(len(raw), 1), CHUNK):
            part = base64.b64encode(raw[offset : offset + CHUNK]).decode("ascii")
            number, hello = self._request("put", path=path, offset=offset, truncate=offset == 0, mode=mode, data=part)
            self.reply(number, f"writing {path}", 120, hello)

    def get(self, path: str) -> bytes:
        """Read a file of the guest to its end, sysfs and debugfs files too; LabError if it cannot be read."""
        data = b""
        while True:
            number, hello = self._request("get", path=path, offset=len(data), size=CHUNK)
            reply = self.reply(number, f"reading {path}", 120, hello)
            data += base64.b64decode(reply["data"])
            if reply["eof"]:
                return data

    def _request(self, op: str, **fields: Any) -> tuple[str, Hello]:
        """Send a request for the running boot: its number, and the agent that it was sent to."""
        with self.machine.lock:
            self._sequence += 1
            number, hello = str(self._sequence), self._hellos[-1]
        self.machine.send("agent", {"id": number, "boot_id": hello.boot_id, "op": op, **fields})
        return number, hello

    def reply(self, number: str, what: str, timeout: float, hello: Hello) -> Json:
        """Wait for the reply to a request; LabError if it is an error, GuestRebooted if another agent has come."""

        def arrived() -> Json | None:
            if number in self._replies:
                return self._replies.pop(number)
            return None if self._hellos[-1] is hello else {"gone": True}

        reply = self.machine.wait(f"the end of {what!r} in the guest", timeout, arrived)
        if "gone" in reply:
            raise GuestRebooted(f"the guest went into another boot during {what!r}\n{self.machine.tail()}")
        if not reply["ok"]:
            raise LabError(f"{what} in the guest: {reply['error']}")
        return reply

    def _take(self, line: bytes) -> None:
        """Sort one line from the agent, with the lock held; half a line from before a kexec is skipped."""
        try:
            message = json.loads(line)
        except ValueError:
            return
        match message:
            case {"hello": fields}:
                self._hellos.append(Hello(**fields, seconds=self.machine.age(), how=self._how()))
            case {"id": str(number), "ok": bool()}:
                self._replies[number] = message

    def _how(self) -> Literal["power-on", "reset", "kexec"]:
        """How the boot began whose hello just came. An agent that only restarted counts as a kexec: look at boot_id."""
        before, self._resets = self._resets, self.machine.resets
        if not self._hellos:
            return "power-on"
        return "reset" if self._resets > before else "kexec"

    # -- the machine ------------------------------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command (see Machine.qmp)."""
        return self.machine.qmp(command, **arguments)

    def console(self) -> str:
        """Everything that the serial console has printed."""
        return self.machine.console()

    def wait_console(self, pattern: str, timeout: float, *, since: int = 0) -> re.Match[str]:
        """Wait for a regular expression in the console's text from character `since` on."""
        return self.machine.wait_console(pattern, timeout, since=since)


def _text(field: str) -> str:
    """Text of a base64 field; bytes that are no UTF-8 become replacement characters."""
    return base64.b64decode(field).decode(errors="replace")
