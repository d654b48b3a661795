# SPDX-License-Identifier: LGPL-2.1-or-later
"""The freeze of 1 and of 100 hooks in a guest: as units of systemd, beside what they were before, children of khod.

`freeze` is the barrier alone, `activate` the step of a whole khod as its record has it. The units were started by
`prepare`, which is held against what systemd itself takes for such units, with their end, where it is asked for all of
them at once by a client that reads nothing of its answers.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.figure import Figure
from tests.lab import disk, kernels
from tests.lab.conftest import usual
from tests.lab.host import Host

COUNTS = {1: 7, 100: 3}
"""How many hooks, and how many rounds."""
MOST_RATIO, MOST_OVER_SYSTEMD = 1.5, 1.5
LIMIT = 900.0  # seconds for anything that is told here
RUNNERS = ("units", "children")

# Prints the seconds of each freeze, in turn with each way to run a hook; `bare` is systemd without khod.
DRIVER = """\
import asyncio, glob, json, os, socket, subprocess, sys, time
from array import array
from jeepney import DBusAddress, new_method_call
from jeepney.auth import BEGIN, NEGOTIATE_UNIX_FD, make_auth_external
from khod.producers import children, transient
from khod.producers.barrier import Barrier, Verb
from khod.producers.commands import Command
from khod.producers.hooks import Hook

async def freeze(runner, count):
    commands = {"freeze": ["/bin/true"]}
    hooks = [Hook(f"hook-{number}", 900.0, commands=commands, runner=runner) for number in range(count)]
    barrier = Barrier.from_producers(hooks, "run-1", lambda _: None)
    found = []
    for verb in (Verb.prepare, Verb.freeze):
        began = time.monotonic()
        await barrier.broadcast(verb)
        found.append(time.monotonic() - began)
        await settle(0 if verb is Verb.freeze or not runner.has_units else count)
    return found

async def settle(count):
    # So many units, and a systemd that is through with them.
    while len(glob.glob("/sys/fs/cgroup/system.slice/kho-hook-*")) != count:
        await asyncio.sleep(0.1)
    subprocess.run(["systemctl", "is-active", "-q", "no-such-unit.service"])

def bare(count):
    null = os.open("/dev/null", os.O_RDWR)
    manager = DBusAddress("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
    messages = []
    for number in range(count):
        command = Command(f"hook-{number}", ["/bin/true"], {"KHO_VERB": "freeze"})
        body = (transient.unit_name(command.name), "fail", [*transient._properties(command, null, null)], [])
        call = new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        messages.append(call.serialise(number + 1, array("i")))
    with socket.socket(socket.AF_UNIX) as connection:
        began = time.monotonic()
        connection.connect("/run/systemd/private")
        connection.sendall(b"\\0" + make_auth_external() + NEGOTIATE_UNIX_FD + BEGIN)
        heard = connection.recv(4096)
        for message in messages:
            socket.send_fds(connection, [message], [null, null])
        while heard.count(b"UnitRemoved\\0") < count:
            heard += connection.recv(1 << 20)
    os.close(null)
    return time.monotonic() - began

async def main(count, rounds):
    children.adopt_orphans()
    runners = {"units": transient.TransientUnits(), "children": children.Children()}
    found = {name: [] for name in (*runners, "prepare", "bare")}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            prepared, frozen = await freeze(runner, count if number else 1)
            found[name].append(frozen)
            if runner.has_units:
                found["prepare"].append(prepared)
        found["bare"].append(bare(count if number else 1))
        await settle(0)
    print(json.dumps({name: seconds[1:] for name, seconds in found.items()}))

asyncio.run(main(*map(int, sys.argv[1:])))
"""
# khod, with hooks as `units` or as `children`.
KHOD = """\
import sys
from khod import daemon
if sys.argv.pop(1) == "children":
    daemon.TransientUnits = daemon.Children
daemon.main()
"""
# No profile: it lets khod execute nothing, as its children are.
DROP_IN = """\
[Service]
AppArmorProfile=
ExecStart=
ExecStart=/usr/bin/python3 /var/lib/khod/khod-with.py {runner}
"""
PATIENT = f"[deadlines]\nprepare = {LIMIT}\nfreeze = {LIMIT}\n"
HOOK = f'freeze = ["/bin/true"]\ntimeout = {LIMIT}\n'


def run() -> Iterator[Figure]:
    """Measure a guest with 7.3.4, everything in turn."""
    subprocess.run(["make", "--silent", "deb"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = disk.standard_files([kernels.find(version) for version in kernels.VERSIONS])
    made = disk.build(sorted(Path("dist").glob("khod_*.deb")), files)
    with tempfile.TemporaryDirectory() as name, usual(kernels.find("7.3.4"), made, Path(name) / "console.log") as guest:
        host = Host(guest)
        guest.put("/run/driver.py", DRIVER)
        guest.put("/var/lib/khod/khod-with.py", KHOD)
        host.configure("patient", PATIENT)
        for count, rounds in COUNTS.items():
            hooks = "1 hook" if count == 1 else f"{count} hooks"
            words = ["python3", "/run/driver.py", str(count), str(rounds)]
            found = json.loads(guest.run(words, timeout=2 * LIMIT).stdout)
            yield _ratio(f"freeze of {hooks} / as children", found["units"], found["children"], MOST_RATIO)
            yield _ratio(f"prepare of {hooks} / by systemd alone", found["prepare"], found["bare"], MOST_OVER_SYSTEMD)
            steps = _steps(host, count, rounds)
            yield _ratio(f"freeze of {hooks} in activate / as children", steps["units"], steps["children"], MOST_RATIO)


def _steps(host: Host, count: int, rounds: int) -> dict[str, list[float]]:
    """Activate and abort in turn with each runner; the seconds that the freezes took."""
    for number in range(count):
        host.guest.put(f"/etc/kho/producers.d/hook-{number}.toml", HOOK)
    found: dict[str, list[float]] = {runner: [] for runner in RUNNERS}
    for _ in range(rounds):
        for runner, seconds in found.items():
            host.shell("mkdir -p /run/systemd/system/kho-handover.service.d")
            host.guest.put("/run/systemd/system/kho-handover.service.d/bench.conf", DROP_IN.format(runner=runner))
            host.shell("systemctl daemon-reload; systemctl restart kho-handover")
            host.guest.run(["khoctl", "activate"], timeout=LIMIT)
            timings = {timing["step"]: timing["seconds"] for timing in host.status()["timings"]}
            seconds.append(timings["freeze"])
            host.guest.run(["khoctl", "abort"], timeout=LIMIT)
    host.shell("rm /etc/kho/producers.d/hook-*.toml")
    return found


def _ratio(name: str, ours: Sequence[float], theirs: Sequence[float], most: float) -> Figure:
    shown = ", ".join(f"{mine * 1e3:.0f}/{other * 1e3:.0f}" for mine, other in zip(ours, theirs, strict=True))
    return Figure(name, statistics.median(ours) / statistics.median(theirs), most, "", f"ms, in turn: {shown}")
