# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handovers in a row in one guest: each is verified, the chain has all of them, and nothing grows beyond its bounds."""

import json
from dataclasses import dataclass

import pytest

from tests.lab.conftest import Online
from tests.lab.host import MARKER, Host, image

VERSION = "7.3.4"
MIB = 1 << 20
KHOD_GROWTH_BYTES = 8 * MIB
"""What khod may hold more after the last handover than after the first: its caches are full by then."""
HOST_GROWTH_BYTES = 16 * MIB
"""What the host may have less of: its own caches are not counted as available to the byte."""
PAGE_KIB = 4
FILES_BYTES = 4 * MIB
"""What a handover of this guest may leave on the disk: a tree of v3 has 30 KiB, a log and its row less."""


@dataclass(frozen=True)
class Measured:
    """What a host holds and keeps after a handover, in bytes, and the words of its command line.

    `available` has the pages in the processors' own lists of free ones: seen on 7.3.4, up to 46 MiB of them are neither
    free nor used in /proc/meminfo, as many as chance will have it.
    """

    khod: int
    available: int
    files: int
    words: list[str]


def measure(host: Host) -> Measured:
    """Measure once khod has imported what the next handover needs: its memory does not change for a second then."""
    rss = "awk '/^Rss:/ {print $2}' /proc/$(systemctl show -P MainPID kho-handover)/smaps_rollup"
    host.shell(f'until [ "$({rss})" = "$(sleep 1; {rss})" ]; do :; done')
    khod, available, listed, files = host.shell(
        "sync; echo 3 > /proc/sys/vm/drop_caches;"
        "awk '/^Rss:/ {print $2}' /proc/$(systemctl show -P MainPID kho-handover)/smaps_rollup;"
        "awk '/^MemAvailable:/ {print $2}' /proc/meminfo;"
        "awk '/^ +count:/ {pages += $2} END {print pages}' /proc/zoneinfo;"
        "du -sk /var/lib/khod | cut -f1"
    ).split()
    words = [word for word in host.word("/proc/cmdline").split() if not word.startswith("khod.")]
    return Measured(int(khod) * 1024, (int(available) + int(listed) * PAGE_KIB) * 1024, int(files) * 1024, words)


@pytest.mark.parametrize(
    ("generation", "count"),
    [("stateless", 2), *(pytest.param(name, 10, marks=pytest.mark.proof) for name in ("stateless", "v3"))],
)
def test_handovers_in_a_row(online: Online, generation: str, count: int) -> None:
    host = Host(online(VERSION))
    if generation == "v3":
        host.with_module()
    else:
        host.install_producer("holder", f"state={MIB}")
        host.shell("systemctl start holder")
    measured = []
    for number in range(1, count + 1):
        words = [] if number > 1 else ["--append", MARKER]
        before = host.guest.boot_id
        host.khoctl("kexec", *image(VERSION), *words)
        assert host.guest.wait_reboot(before).how == "kexec"
        host.khoctl("verify")
        host.shell(
            f"timeout 120 sh -c 'until [ $(khoctl history --json | grep -o last_boot_id | wc -l) -ge {number} ];"
            " do sleep 0.2; done'"
        )
        status = host.status()
        assert (status["phase"], status["handovers"]) == ("verified", number)
        measured.append(measure(host))
        print(f"{generation} {number}: {status['blackout_seconds']:.2f} ± {status['blackout_error_seconds']:.2f} s")

    chain = json.loads(host.khoctl("history", "chain", "--json").stdout)
    assert [attempt["outcome"] for attempt in chain] == ["verified"] * count
    boots = [attempt["last_boot_id"] for attempt in chain]
    assert boots[0] == host.guest.boot_id
    assert [attempt["first_boot_id"] for attempt in chain[:-1]] == boots[1:]
    first, last = measured[0], measured[-1]
    assert last.words == first.words
    assert last.khod <= first.khod + KHOD_GROWTH_BYTES, measured
    assert last.available >= first.available - HOST_GROWTH_BYTES, measured
    assert last.files <= first.files + count * FILES_BYTES, measured
