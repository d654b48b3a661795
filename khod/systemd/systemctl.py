# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd says of itself and its units, asked with its own commands: over its private socket and not the bus."""

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from khod.text import ASCII_SPACE

BOOTED = "/run/systemd/system"  # sd_booted(3)
ASK_SECONDS = 15.0
"""Seconds a command has; on a host that has just booted, and under load, more than 5 were seen."""

CONTAINERS = frozenset(
    {"systemd-nspawn", "lxc-libvirt", "lxc", "openvz", "docker", "podman", "rkt", "wsl", "proot", "pouch"}
    | {"container-other"}
)
"""What the manager's Virtualization= says and is no virtual machine (systemd-detect-virt(1))."""

Ask = Callable[[Sequence[str]], str | None]
"""Runs a command of systemd's and gives what it prints; None where it fails, or does not end in time."""


@dataclass(frozen=True)
class Manager:
    """The systemd that runs this host: its version, and the kind of virtual machine it is in ("" for none)."""

    version: int
    machine: str


def run_systemctl(command: Sequence[str]) -> str | None:
    """Run a command and give what it prints; see Ask."""
    try:
        process = subprocess.Popen(  # noqa: S603 - one of ours
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    try:
        output = process.communicate(timeout=ASK_SECONDS)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: it may hang where no signal reaches it
        return None
    return output if process.returncode == 0 else None


def ask_manager(ask: Ask = run_systemctl) -> Manager | None:
    """Ask systemd what it is; None where it does not say in time."""
    output = ask(["systemctl", "show", "--property=Version", "--property=Virtualization"])
    return None if output is None else parse_manager(output)


def parse_manager(output: str) -> Manager | None:
    """Read the properties as `systemctl show` prints them; None where there is no version among them."""
    properties = dict(line.partition("=")[::2] for line in output.split("\n"))
    version = re.match(r"v?([0-9]{1,9})", properties.get("Version", ""))
    if version is None:
        return None
    kind = properties.get("Virtualization", "").strip(ASCII_SPACE)
    return Manager(int(version[1]), "" if kind == "none" or kind in CONTAINERS else kind)
