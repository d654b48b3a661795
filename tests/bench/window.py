# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blackout on real kernels: khod's window and the shell recipe's, in turn in the same guest.

Both begin with a line in the kernel log just before the first write of the active phase, and end with
the kernel's own `Starting new kernel`; both times are the kernel's.
"""

import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.bench.figure import Figure
from tests.lab import disk, kernels
from tests.lab.guest import Guest
from tests.lab.host import KHO, Host, image

ROUNDS = 3
BEGIN = "entering the active phase"
LINE = re.compile(r"\[ *(\d+\.\d+)\] (.*)")
RECIPE = """\
cp /lab/kernels/{version}/bzImage /lab/initrd.img /run/; sync
echo "recipe: {begin}" > /dev/kmsg
echo 1 > {switch}
kexec -s -l /run/bzImage --initrd=/run/initrd.img --reuse-cmdline
kexec -e
"""


def run() -> Iterator[Figure]:
    """Measure v3 (7.3.4 with the module) and 6.18.15."""
    subprocess.run(["make", "--silent", "deb"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    module = kernels.find("7.3.4").module()
    files = disk.standard_files([kernels.find(version) for version in kernels.VERSIONS], module)
    made = disk.build(sorted(Path("dist").glob("khod_*.deb")), files)
    for name, version, switch in (
        ("v3", "7.3.4", "/sys/kernel/kho/active"),
        ("6.18", "6.18.15", "/sys/kernel/debug/kho/out/finalize"),
    ):
        with Guest(kernels.find(version), made, cmdline_extra=f"{KHO} ignore_loglevel") as guest:
            guest.wait_online()
            host = Host(guest)
            if name == "v3":
                host.with_module()
            recipe, ours = [], []
            for _ in range(ROUNDS):
                recipe.append(_recipe(host, version, switch))
                ours.append(_khod(host, version))
        ratio = statistics.median(ours) / statistics.median(recipe)
        shown = ", ".join(f"{mine * 1e3:.0f}/{theirs * 1e3:.0f}" for mine, theirs in zip(ours, recipe, strict=True))
        yield Figure(f"window of khod / of the shell recipe, {name}", ratio, 1.0, "", f"ms, in turn: {shown}")


def _recipe(host: Host, version: str, switch: str) -> float:
    since = len(host.guest.console())
    before = host.guest.boot_id
    script = RECIPE.format(version=version, switch=switch, begin=BEGIN)
    host.guest.start(["sh", "-ec", script])
    return _jumped(host, before, since)


def _khod(host: Host, version: str) -> float:
    since = len(host.guest.console())
    before = host.guest.boot_id
    host.guest.start(["khoctl", "kexec", *image(version), "--now"])
    return _jumped(host, before, since)


def _jumped(host: Host, before: str, since: int) -> float:
    """Wait for the next kernel; the seconds between the two lines."""
    host.guest.wait_reboot(before)
    host.guest.wait_online()
    times: dict[str, float] = {}
    for stamp, text in LINE.findall(host.guest.console()[since:]):
        for what in (BEGIN, "Starting new kernel"):
            if what in text:
                times.setdefault(what, float(stamp))
    return times["Starting new kernel"] - times[BEGIN]
