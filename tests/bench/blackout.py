# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long the clients of a producer wait over the jump, heard from outside of the guest.

    python -m tests.bench.blackout [--rounds N]

The guest is Debian as it is installed, alone on the machine, with one service that has 64 MiB of state. By hand means:
the service manager's fd store keeps the state, with `kexec -s -l` and `systemctl kexec`, and no khod on the host.
What the journal on the disk lacks is the time from its last entry to the jump. Nothing else may run meanwhile.

"jump" lasts until the next kernel's clock begins, and takes 0.1 to 0.2 s, but for about one jump in ten, which takes
up to 8 s. Seen in emulation alone, from outside: processor 1 is halted, and processor 0 runs one loop of some 500 bytes
within the loaded image (its page tables lie beside it), before the kernel itself: its decompressor. khod does not run.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figure import Figure, print_figures
from tests.lab import disk, kernels
from tests.lab.guest import Guest
from tests.lab.host import IMAGES, INITRD, KHO, Host, image
from tests.lab.witness import JUMP, Witness

ROUNDS = 5
VERSION = "7.3.4"
MOST_OF_BY_HAND = 0.6
MOST_OF_EARLY = 1.0
MOST_UNLOGGED = 1.0
MOST_GROWTH = 1.2
"""Less than one stop of 2 s would add; without any, the medians of five rounds differed by up to 11 %."""
SLOW_SERVICES = 10
BOOT_SECONDS = 240.0
KHOD_UNITS = "kho-handover.service kho-handover.socket kho-metrics.socket kho-sessions.socket kho-verify.service"
MICROSECOND = 1e-6
STAMP = re.compile(rf"\[ *(\d+\.\d+)\] .*{JUMP}")
"""The kernel's clock at the jump."""

SERVICE = """\
[Unit]
{unit}
[Service]
Type=notify
ExecStart=/usr/bin/python3 /usr/lib/heart/heart.py /dev/console {how}
{service}
[Install]
WantedBy={wanted_by}
"""
EARLY = "DefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target\n"
STORE = "FileDescriptorStoreMax=1\nFileDescriptorStorePreserve=yes\n"
SLOW = "[Service]\nExecStart=/usr/bin/sleep infinity\nExecStop=/usr/bin/sleep 2\n"
BY_HAND = """\
kexec -s -l {image} --initrd={initrd} --command-line='{cmdline}'
systemctl kexec
"""


@dataclass(frozen=True)
class Way:
    """One way over the jump: the service's unit, and khoctl's words, None without khod."""

    name: str
    unit: str
    khoctl: Sequence[str] | None = None
    slow_services: int = 0


DEFAULT = SERVICE.format(unit="", how="store", service=STORE, wanted_by="multi-user.target")
BEFORE_SYSINIT = SERVICE.format(
    unit=f"{EARLY}Before=sysinit.target\n", how="store", service=STORE, wanted_by="sysinit.target"
)
PRODUCER = SERVICE.format(
    unit=f"{EARLY}Wants=kho-handover.service\nAfter=kho-handover.socket\n",
    how="restore",
    service="Slice=kho.slice\nStartupCPUWeight=10000\n",
    wanted_by="multi-user.target",
)
A = Way("A by hand", DEFAULT)
B = Way("B by hand, before sysinit.target", BEFORE_SYSINIT)
C = Way("C khoctl kexec", PRODUCER, ("kexec", *image(VERSION)))
D = Way("D khoctl kexec --now", PRODUCER, ("kexec", *image(VERSION), "--now"))
C_SLOW = Way("C with slow services", PRODUCER, C.khoctl, SLOW_SERVICES)
WAYS = (A, B, C, D, C_SLOW)

Parts = Mapping[str, float]
"""Seconds, by name and in order; together they are the blackout."""


@dataclass(frozen=True)
class Measured:
    """One jump, in seconds."""

    parts: Parts
    unlogged: float
    """From the last entry in the journal on the disk to the jump."""

    @property
    def blackout(self) -> float:
        return sum(self.parts.values())


def run(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Measure each way once in each round, in turn."""
    subprocess.run(["make", "--silent", "deb"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    made = disk.build(
        sorted(Path("dist").glob("khod_*.deb")), disk.standard_files([kernels.find(VERSION)]), as_installed=True
    )
    found: dict[Way, list[Measured]] = {way: [] for way in WAYS}
    for number in range(rounds):
        first = number % len(WAYS)  # each way is the first in a row of kernels once, and the last once
        with Guest(kernels.find(VERSION), made, cmdline_extra=KHO) as guest:
            host = Host(guest)
            host.guest.put("/usr/lib/heart/heart.py", Path("tests/lab/heart.py").read_bytes())
            host.guest.put("/etc/systemd/system/slow@.service", SLOW)
            for way in (*WAYS[first:], *WAYS[:first]):
                found[way].append(_measure(host, way))
                print(f"     {_describe(way, found[way][-1:])}", file=sys.stderr, flush=True)
    yield _compare(C, A, MOST_OF_BY_HAND, found)
    yield _compare(D, A, MOST_OF_BY_HAND, found)
    yield _compare(C, B, MOST_OF_EARLY, found)
    yield _compare(C_SLOW, C, MOST_GROWTH, found)
    unlogged = {way: statistics.median(one.unlogged for one in found[way]) for way in (A, C)}
    how = f"medians of {rounds}: {unlogged[C]:.3f} s, {unlogged[A]:.3f} s"
    yield Figure(f"what the journal lacks after {C.name} / {A.name}", unlogged[C] / unlogged[A], MOST_UNLOGGED, "", how)


def _compare(ours: Way, theirs: Way, most: float, found: Mapping[Way, list[Measured]]) -> Figure:
    mine, other = (statistics.median(one.blackout for one in found[way]) for way in (ours, theirs))
    how = f"medians of {len(found[ours])}. {_describe(ours, found[ours])}. {_describe(theirs, found[theirs])}"
    return Figure(f"blackout of {ours.name} / {theirs.name}", mine / other, most, "", how)


def _describe(way: Way, found: Sequence[Measured]) -> str:
    total = statistics.median(one.blackout for one in found)
    parts = (f"{name} {statistics.median(one.parts[name] for one in found):.2f}" for name in found[0].parts)
    return f"{way.name}: {total:.2f} s = {' + '.join(parts)}"


def _measure(host: Host, way: Way) -> Measured:
    """Make the jump; how long the service was silent, and what the journal lacks."""
    _install(host, way)
    witness = Witness(host.guest.machine)
    witness.begin()
    before, since = host.guest.boot_id, len(host.guest.console())
    host.guest.start(["sh", "-ec", _script(host, way)])
    silence = witness.silence()
    assert host.guest.wait_reboot(before).how == "kexec"
    host.guest.wait_online(BOOT_SECONDS)
    userspace = _read_times(host, "", "UserspaceTimestampMonotonic")[0]
    beats = silence.end - silence.kernel
    parts = {
        "freeze to jump": silence.jump,
        "jump": silence.kernel - silence.jump,
        "kernel until init": userspace,
    }
    starts = "heart" if way.khoctl is None else "kho-handover"
    (began,) = _read_times(host, starts, "ExecMainStartTimestampMonotonic")
    parts |= {f"systemd until {starts} starts": began - userspace, "until it beats": beats - began}
    stamp = STAMP.search(host.guest.console(), since)
    assert stamp
    last = json.loads(host.shell("journalctl -b -1 -n 1 -o json"))
    return Measured(parts, float(stamp[1]) - int(last["__MONOTONIC_TIMESTAMP"]) * MICROSECOND)


def _install(host: Host, way: Way) -> None:
    """Start the service, and have it and khod started in the next kernel as this way needs them."""
    host.guest.wait_online(BOOT_SECONDS)
    host.shell("systemctl disable -q --now heart 2>/dev/null || true; systemctl clean --what=fdstore heart || true")
    host.guest.put("/etc/systemd/system/heart.service", way.unit)
    host.shell(
        f"systemctl mask -q --now {KHOD_UNITS}"
        if way.khoctl is None
        else f"systemctl unmask -q {KHOD_UNITS}; systemctl start kho-handover.socket kho-handover.service"
    )
    host.shell("systemctl daemon-reload; systemctl enable -q --now heart; sync")
    if way.slow_services:
        host.shell(f"systemctl start $(printf 'slow@%s ' $(seq {way.slow_services}))")


def _script(host: Host, way: Way) -> str:
    if way.khoctl is not None:
        return f"khoctl {' '.join(way.khoctl)}"
    cmdline = host.guest.hellos[0].cmdline
    return BY_HAND.format(image=f"{IMAGES}/{VERSION}/bzImage", initrd=INITRD, cmdline=cmdline)


def _read_times(host: Host, unit: str, *names: str) -> list[float]:
    """Return time stamps of a unit, of systemd itself without one, in seconds."""
    return [int(host.shell(f"systemctl show -P {name} {unit}")) * MICROSECOND for name in names]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.blackout")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    sys.exit(print_figures(run(parser.parse_args().rounds)))
