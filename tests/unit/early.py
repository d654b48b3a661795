# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine with LUO whose khods begin with an early restore, and start no further before they are let go on."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from khod.handover.session_names import session_of
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, until
from tests.unit.luo import Hand, LuoKhod, System, memfd, one_file

AS_SYSTEMD = """
import ctypes, json, os, sys
settings = json.loads(sys.argv[1])
fds = [os.open(path, os.O_WRONLY) for path in settings["store"]]
fds.append(ctypes.CDLL(None).syscall(438, os.pidfd_open(settings["pid"]), settings["listening"], 0))  # pidfd_getfd(2)
high = [os.dup2(fd, 200 + number) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ.update(settings["environment"], LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.executable, [sys.executable, "-c", settings["starter"], *sys.argv[2:]])
"""
"""As that of tests/unit/luo.py, and passes the socket that clients connect to."""

STARTER = """
import os, signal
from pathlib import Path
from khod.early import restore
from khod.__main__ import run_daemon
from khod.early.restore import begin_early_restore
from khod.systemd.passed import listen_fds_by_name
from tests.unit.luo import RemoteKernel
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{first}
passed = listen_fds_by_name()
early = begin_early_restore("{at}/state", "{at}", passed, RemoteKernel(Path("{at}/kernel")))
open("{at}/gate").read()
run_daemon(passed, early)
"""


class EarlyKhod(LuoKhod):
    """One khod of an EarlySystem."""

    def __init__(self, system: "EarlySystem", first: str) -> None:
        self._early_system, self._first = system, first
        super().__init__(system, "", ready=False)

    def command(self) -> list[str]:
        system = self._early_system
        environment = {
            "PYTHONPATH": f"{system.directory / 'site'}:{REPOSITORY}",
            "LISTEN_FDNAMES": ":".join([*system.kept, "varlink"]),
        }
        settings = {
            "environment": environment,
            "store": [f"/proc/{os.getpid()}/fd/{fd}" for fd in system.kept.values()],
            "pid": os.getpid(),
            "listening": system.listening.fileno(),
            "starter": STARTER.format(at=system.directory, first=self._first),
        }
        return [sys.executable, "-S", "-c", AS_SYSTEMD, json.dumps(settings), *Khod.command(self)[3:]]

    def go_on(self) -> None:
        """Let it start as a whole."""
        with (self.directory / "gate").open("w"):
            pass


class EarlySystem(System):
    """One machine below a directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(directory / "socket"))
        self.listening.listen()
        os.mkfifo(directory / "gate")

    def start(self, first: str = "") -> EarlyKhod:
        """Start a khod, which runs `first` and waits for `go_on` once its early restore has begun."""
        assert self._running.wait(DEADLINE)
        if self._khods:
            self._khods[-1].hear_out()
        made = EarlyKhod(self, first)
        self._khods.append(made)
        return made

    def leave(self, producers: Iterable[tuple[str, list[str]]]) -> str:
        """Have producers leave one file each, and jump; each has those after which it comes. Return the run."""
        khod = self.start()
        khod.go_on()
        hands = {name: Hand(khod, name, after=after) for name, after in producers}
        operator = subprocess.Popen(
            [sys.executable, "-m", "khoctl", f"--socket={khod.socket}", "kexec", *self.images],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for verb in ("prepare", "freeze"):
            for name, hand in hands.items():
                if verb == "prepare":
                    hand.ready()
                    assert hand.told() == verb
                    hand.ready(**one_file(fd := memfd(f"of {name}".encode())))
                    os.close(fd)
                else:
                    assert hand.told() == verb
                    hand.ready()
        assert khod.process.wait(DEADLINE) == -signal.SIGKILL
        assert self._running.wait(DEADLINE)  # what was left has arrived
        operator.kill()  # it would ask the next khod, which is still to be started
        operator.wait()
        for hand in hands.values():
            hand.close()
        return khod.record.run

    def flip(self, run: str, name: str) -> None:
        """Have the file of a producer arrive with other contents."""
        os.pwrite(self.luo._arrived[session_of(run, name)][0], b"?", 0)

    def close(self) -> None:
        super().close()
        self.listening.close()


def wait_verdict(khod: Khod) -> dict[str, str]:
    """Wait for the verdict; return the results of its checks of contents."""
    until(lambda: khod.record.verdict is not None and khod.record.phase.value in ("verified", "degraded"), khod.process)
    verdict = khod.record.verdict
    assert verdict is not None
    return {check.name: check.result.value for check in verdict.checks if check.name.startswith("contents")}
