# SPDX-License-Identifier: LGPL-2.1-or-later
"""200 hosts on the simulated kernel, one khod each, rolled in batches: none is lost, each failure is named."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.rolled import Controller, RolledHost, give_past

HOSTS, BATCH, FORKS = 200, 20, 6
FAULTS = {17: ("lose", "degraded"), 101: ("cold", "cold_boot"), 180: ("lose", "degraded")}
MAX_BYTES = 8 << 30


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[list[RolledHost]]:
    with ExitStack() as stack:
        hosts = []
        for number in range(HOSTS):
            directory = tmp_path / f"host{number:03}"
            give_past(directory, blackout=60.0, attempts=5)  # no host can be slower than that
            hosts.append(RolledHost(directory))
            stack.callback(hosts[-1].close)
        yield hosts


def memory_of(host: RolledHost) -> int:
    """Give the bytes of memory that its khod has, its part of what it shares."""
    text = Path(f"/proc/{host.process.pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) << 10


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_a_fleet_of_200_hosts_is_rolled(tmp_path: Path, fleet: list[RolledHost]) -> None:
    for number, (fault, _) in FAULTS.items():
        fleet[number].kernel.set_fault(fault, True)
    memory, began = sum(map(memory_of, fleet)), time.monotonic()
    ended = Controller(tmp_path).play(
        {host.name: host.inventory for host in fleet},
        options=[f"--forks={FORKS}"],
        seconds=3000,
        rolling_serial=[1, BATCH],
        rolling_go_on_after=["degraded", "cold_boot"],
    )
    took = time.monotonic() - began
    print(f"{HOSTS} hosts in batches of {BATCH}: {took:.0f} s; their khods have {memory / (1 << 20):.0f} MiB")
    assert ended.code == 2, ended.out[-4000:]
    assert f"{HOSTS} hosts: {HOSTS - len(FAULTS)} verified" in ended.out
    for number, (_, outcome) in FAULTS.items():
        assert f"{fleet[number].name}  {outcome}" in ended.out
    assert [host.starts for host in fleet] == [1] * HOSTS
    outcomes = [host.khoctl("history", "-n", "1", "--json").json["attempts"][0]["outcome"] for host in fleet]
    assert outcomes == [FAULTS[number][1] if number in FAULTS else "verified" for number in range(HOSTS)]
    assert memory < MAX_BYTES
