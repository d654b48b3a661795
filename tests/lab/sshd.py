# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real sshd and ssh on the loopback, with keys and a configuration of their own: each host has a khod to itself."""

import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod

SSHD = "/usr/sbin/sshd"
USER = pwd.getpwuid(os.getuid()).pw_name


class Sshd:
    """One host for ssh: its sshd, its host key, and a khoctl in its PATH that speaks to a khod's socket."""

    def __init__(self, directory: Path, khod_socket: Path, *, khoctl: bool = True) -> None:
        self.directory = directory
        directory.mkdir()
        self.key = make_key(directory / "host_key")
        path = directory / "bin"
        path.mkdir()
        if khoctl:
            words = f'exec env PYTHONPATH={REPOSITORY} {sys.executable} -m khoctl "$@"'
            (path / "khoctl").write_text(f"#!/bin/sh\n{words}\n")
            (path / "khoctl").chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            self.port = reserved.getsockname()[1]
        self.settings = {
            "ListenAddress": "127.0.0.1",
            "Port": str(self.port),
            "HostKey": str(self.key),
            "PidFile": "none",
            "AuthorizedKeysFile": str(directory.parent / "login.pub"),
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "SetEnv": f"PATH={path}:/usr/bin:/bin KHOD_SOCKET={khod_socket}",
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        Path("/run/sshd").mkdir(exist_ok=True)
        config = self.directory / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in self.settings.items()))
        command = [SSHD, "-D", "-e", "-f", str(config)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        assert "Server listening" in self.process.stderr.readline()

    def stop(self) -> None:
        """End it, and the sessions that it has."""
        if self.process is None:
            return
        sessions = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for session in sessions:
            with suppress(ProcessLookupError):  # it was ending
                os.kill(int(session), 15)
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)
        self.process = None


def make_key(path: Path) -> Path:
    """Make a key without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@contextmanager
def mute_host() -> Iterator[int]:
    """Listen as a host that takes connections and never says a word; give its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Operator:
    """Who has the key to the hosts: an ssh with a configuration of its own in PATH, and khoctl as a process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_key(directory / "login")
        (directory / "bin").mkdir()
        (directory / "bin/ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {directory / "config"} "$@"\n')
        (directory / "bin/ssh").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "NO_COLOR": "1",
        }
        self._hosts: dict[str, Sshd] = {}
        self.configure()

    def add(self, name: str, khod: Khod | Path, *, khoctl: bool = True) -> Sshd:
        """Add a host by this name, and start its sshd."""
        path = khod if isinstance(khod, Path) else khod.socket
        made = self._hosts[name] = Sshd(self.directory / name, path, khoctl=khoctl)
        made.start()
        self.configure()
        return made

    def configure(self, extra: str = "") -> None:
        """Write the operator's configuration of ssh, and which host keys he knows."""
        lines = [f"Host {name}\n  HostName 127.0.0.1\n  Port {host.port}\n" for name, host in self._hosts.items()]
        (self.directory / "config").write_text(
            f"{extra}{''.join(lines)}Host *\n  User {USER}\n  IdentityFile {self.directory / 'login'}\n"
            f"  IdentityAgent none\n  UserKnownHostsFile {self.directory / 'known_hosts'}\n"
        )
        known = (
            f"[127.0.0.1]:{host.port} {(host.directory / 'host_key.pub').read_text()}" for host in self._hosts.values()
        )
        (self.directory / "known_hosts").write_text("".join(known))

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "khoctl", *map(str, words)]

    def start(self, *words: str | Path) -> "subprocess.Popen[str]":
        """Start khoctl; its output is read by the caller."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*words), env=self.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def khoctl(self, *words: str | Path, given: str = "") -> Answer:
        """Run khoctl to its end."""
        ended = subprocess.run(
            self.command(*words),
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=DEADLINE * 2,
            check=False,
        )
        return Answer(ended.returncode, ended.stdout, ended.stderr)

    def close(self) -> None:
        for host in self._hosts.values():
            host.stop()
