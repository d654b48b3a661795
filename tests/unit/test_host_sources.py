# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the recorder's sources ask of a host after the jump: about which boot, and with which minimum uptime."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.abi.calls import HostCalls
from khod.engine.sources import host_sources
from khod.history.log import append_entries
from khod.history.model import Departure, RunLog
from khod.systemd import dbus, departure
from tests.unit.fakebus import fake_bus
from tests.unit.timelines import FIRST, RUN, orderly

ASKED = Departure(start_monotonic=1.0)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Give the arguments with which the departure was asked for; no systemd answers unless a test starts one."""
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    found: list[dict[str, Any]] = []

    async def read(boot_id: str, _worker: object, **given: Any) -> Departure:
        found.append({"boot_id": boot_id, **given})
        return ASKED

    monkeypatch.setattr(departure, "read_departure", read)
    return found


async def read_departure(root: Path, log: RunLog) -> None:
    read = host_sources(HostCalls(root)).read_departure
    assert read is not None
    path = root / f"{RUN}.jsonl"
    append_entries(path, [*([log.begun] if log.begun else []), *log.readings])
    assert await read(path) == ASKED


async def test_the_boot_in_which_the_run_began_is_asked_for(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    (tmp_path / "etc/systemd").mkdir(parents=True)
    (tmp_path / "etc/systemd/system.conf").write_text("[Manager]\nMinimumUptimeSec=1min\n")
    log = orderly()
    log.readings = [replace(one, boottime=one.monotonic + 10) for one in log.readings]
    await read_departure(tmp_path, log)
    assert asked == [{"boot_id": FIRST.boot_id, "minimum_uptime": 60.0, "suspended": 10.0}]


@pytest.mark.parametrize(
    ("version", "machine", "seconds"), [("262", "none", 15.0), ("262", "kvm", 0.0), ("260", "none", 0.0)]
)
async def test_the_default_is_systemd_s(
    tmp_path: Path, asked: list[dict[str, Any]], version: str, machine: str, seconds: float
) -> None:
    """15 s on bare metal, since 261."""
    async with fake_bus(tmp_path / "private") as bus:
        bus.manager = {"Version": version, "Virtualization": machine}
        await read_departure(tmp_path, orderly())
    assert [one["minimum_uptime"] for one in asked] == [seconds]


async def test_a_log_without_its_begin_asks_for_no_boot(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    await read_departure(tmp_path, RunLog())
    assert asked == [{"boot_id": "", "minimum_uptime": 0.0, "suspended": 0.0}]
