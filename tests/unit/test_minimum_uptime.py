# SPDX-License-Identifier: LGPL-2.1-or-later
"""MinimumUptimeSec=: systemd's own rules for its time spans, its files and their order, and the check `uptime`."""

import asyncio
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from khod.model import CheckResult
from khod.preflight.minimum_uptime import read_setting
from khod.systemd import dbus
from khod.systemd.facts import SystemdFacts
from khod.systemd.manager import Manager
from khod.systemd.time_span import parse_span
from tests.unit.fakebus import fake_bus
from tests.unit.test_preflight import Site

SPANS: list[tuple[str, float | None]] = [
    ("15", 15),
    ("15s", 15),
    (" 15 sec ", 15),
    ("1min 30s", 90),
    ("1min30s", 90),
    ("1m", 60),
    ("1M", 2629800),
    ("2 h", 7200),
    ("1hr 1hour 1hours", 10800),
    ("1d", 86400),
    ("1 week", 604800),
    ("1y", 31557600),
    ("1month", 2629800),
    ("500ms", 0.5),
    ("250 msec 250000us", 0.5),
    ("1\u00b5s", 1e-6),
    ("1.5", 1.5),
    ("1.5min", 90),
    ("0", 0),
    ("+5", 5),
    ("15 30", 45),
    ("15s\t30s", 45),
    ("infinity", math.inf),
    ("  infinity ", math.inf),
    ("", None),
    ("   ", None),
    ("-1", None),
    ("-0", None),
    ("infinity 1s", None),
    ("Infinity", None),
    ("soon", None),
    ("15 bananas", None),
    ("15x", None),
    ("1.", None),
    (".5", None),
    ("1.s", None),
    ("12.34.56", None),
    ("1_000", None),
    ("\u0661\u0665", None),
    ("15\u00a0s", None),
    ("99999999999999999999999", None),
    ("1" * 5000, None),
    ("600000y", None),
]


@pytest.mark.parametrize(("text", "seconds"), SPANS, ids=lambda value: ascii(value)[:20])
def test_a_time_span_is_read_as_systemd_does(text: str, seconds: float | None) -> None:
    assert parse_span(text) == seconds


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.lay({"proc/uptime": "4.20 8.11\n", "run/systemd/system/x": ""})
    return made


def seconds(site: Site) -> float | None:
    found = read_setting(site.calls)
    return None if found is None else found.seconds


def manager(value: str) -> str:
    return f"[Manager]\nMinimumUptimeSec={value}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (manager("30"), 30),
        ("[Manager]\n  MinimumUptimeSec = 1min \n", 60),
        ("[Manager]\n#MinimumUptimeSec=30\n; MinimumUptimeSec=30\n", None),
        ("MinimumUptimeSec=30\n", None),
        ("[Other]\nMinimumUptimeSec=30\n[Manager]\n", None),
        ("[Manager]\nminimumuptimesec=30\n", None),
        ("[Manager]\nMinimumUptimeSec=30\nMinimumUptimeSec=40\n", 40),
        ("[Manager]\nMinimumUptimeSec=30\nMinimumUptimeSec=\n", None),
        ("[Manager]\nMinimumUptimeSec=30\nMinimumUptimeSec=nonsense\n", 30),
        ("[Manager]\nMinimumUptimeSec=1min \\\n# and\n 30s\n", 90),
        ("[Manager]\nMinimumUptimeSec=30\\", 30),
        ("[Manager]\r\nMinimumUptimeSec=30\r\n", 30),
        ("[Manager]\nMinimumUptimeSec\n", None),
        ("\xff\xfe[Manager]\n", None),
    ],
)
def test_a_file_is_read_as_systemd_does(site: Site, text: str, expected: float | None) -> None:
    site.lay({"etc/systemd/system.conf": text})
    assert seconds(site) == expected


def test_of_the_main_files_the_first_counts_and_drop_ins_come_after_it(site: Site) -> None:
    site.lay({"usr/lib/systemd/system.conf": manager("1")})
    assert seconds(site) == 1
    site.lay({"usr/local/lib/systemd/system.conf": manager("2")})
    assert seconds(site) == 2
    site.lay({"run/systemd/system.conf": manager("3")})
    assert seconds(site) == 3
    site.lay({"etc/systemd/system.conf": "[Manager]\n"})
    assert seconds(site) is None, "the file in /etc hides the others whole"
    site.lay({"usr/lib/systemd/system.conf.d/10-a.conf": manager("4")})
    assert seconds(site) == 4
    site.lay({"run/systemd/system.conf.d/20-b.conf": manager("5")})
    site.lay({"etc/systemd/system.conf.d/05-c.conf": manager("6")})
    assert seconds(site) == 5, "by name, in whatever directory"
    site.lay({"etc/systemd/system.conf.d/20-b.conf": manager("7")})
    assert seconds(site) == 7, "of one name the one in /etc"
    found = read_setting(site.calls)
    assert found is not None
    assert found.where == "/etc/systemd/system.conf.d/20-b.conf"
    site.lay({"etc/systemd/system.conf.d/30-d": manager("8"), "etc/systemd/system.conf.d/.40.conf": manager("9")})
    assert seconds(site) == 7
    site.lay({"etc/systemd/system.conf.d/90-z.conf": manager("")})
    assert seconds(site) is None, "empty resets"


def test_a_drop_in_is_masked_by_a_link_to_dev_null(site: Site) -> None:
    site.lay({"usr/lib/systemd/system.conf.d/a.conf": manager("60")})
    site.link("etc/systemd/system.conf.d/a.conf", "/dev/null")
    assert seconds(site) is None


STRANGE: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_file_is_not_waited_for(site: Site, what: str) -> None:
    site.lay({"etc/systemd/system.conf.d/a.conf": manager("60")})
    STRANGE[what](site.root / "etc/systemd/system.conf.d/b.conf")
    assert seconds(site) == 60


def test_the_kernel_command_line_wins(site: Site) -> None:
    site.lay({"etc/systemd/system.conf": manager("60")})
    for line, expected in (
        ("quiet systemd.minimum_uptime_sec=5", 5),
        ("systemd.minimum-uptime-sec=5", 5),
        ('systemd.minimum_uptime_sec="1min 30s" ro', 90),
        ('"systemd.minimum_uptime_sec=1min 30s"', 90),
        ("systemd.minimum_uptime_sec=5 systemd.minimum_uptime_sec=0", 0),
        ("systemd.minimum_uptime_sec=what", 60),
        ("systemd.minimum_uptime_sec=", 60),
        ("systemd.minimum_uptime_sec", 60),
        ("rd.systemd.minimum_uptime_sec=5", 60),
    ):
        site.lay({"proc/cmdline": f"{line}\n"})
        assert seconds(site) == expected, line


@pytest.mark.parametrize(
    ("version", "machine", "expected"),
    [
        ("262 (262.1-1)", "", Manager(262, "")),
        ("261~rc2-1", "kvm", Manager(261, "kvm")),
        ("v255.4", "none", Manager(255, "")),
        ("262", "lxc", Manager(262, "")),
        ("", "", None),
        ("Failed to connect", "kvm", None),
    ],
)
def test_the_manager_s_word_is_read(version: str, machine: str, expected: Manager | None) -> None:
    assert Manager.from_properties(version, machine) == expected


BARE, VIRTUAL, OLD = Manager(262, ""), Manager(262, "kvm"), Manager(260, "")


@pytest.mark.parametrize(
    ("up", "text", "manager_", "result", "words"),
    [
        ("4.2", "", BARE, CheckResult.warn, ["11 s", "`now`", "Wait 11 s", "default"]),
        ("14.9", "", BARE, CheckResult.warn, ["1 s"]),
        ("15.0", "", None, CheckResult.passed, ["15 s"]),
        ("4.2", "", VIRTUAL, CheckResult.passed, ["kvm"]),
        ("4.2", manager("1min"), VIRTUAL, CheckResult.warn, ["56 s", "/etc/systemd/system.conf"]),
        ("4.2", manager("0"), BARE, CheckResult.passed, []),
        ("4.2", manager("infinity"), BARE, CheckResult.warn, ["for ever", "`now`"]),
        ("999999", manager("infinity"), OLD, CheckResult.passed, ["260"]),
        ("4.2", "", OLD, CheckResult.passed, ["260"]),
        ("4.2", "", None, CheckResult.warn, ["may want", "11 s"]),
    ],
)
def test_a_sleep_in_the_blackout_is_warned_of(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    up: str,
    text: str,
    manager_: Manager | None,
    result: CheckResult,
    words: list[str],
) -> None:
    monkeypatch.setattr(SystemdFacts, "describe_manager", lambda _self: manager_)
    site.lay({"proc/uptime": f"{up} 1.0\n", "etc/systemd/system.conf": text})
    found = site.checks()["uptime"]
    assert found.result is result, found.evidence
    assert all(word in f"{found.evidence} {found.remedy}" for word in words), found
    assert "`now` does not wait" in found.evidence or result is not CheckResult.warn


def test_systemd_is_asked_only_where_it_would_matter(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_self: SystemdFacts) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(SystemdFacts, "describe_manager", never)
    site.lay({"proc/uptime": "15.00 1.0\n"})
    assert site.checks()["uptime"].result is CheckResult.passed
    (site.root / "proc/uptime").unlink()
    assert site.checks()["uptime"].result is CheckResult.skipped


def test_systemd_is_asked_at_its_private_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))

    async def ask() -> Manager | None:
        async with fake_bus(tmp_path / "private") as bus:
            bus.manager = {"Version": "262.1-1", "Virtualization": "kvm"}
            return await asyncio.to_thread(SystemdFacts().describe_manager)

    assert asyncio.run(ask()) == Manager(262, "kvm")


def test_a_systemd_that_hangs_or_is_not_there_gives_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    assert SystemdFacts().describe_manager() is None
    monkeypatch.setattr("khod.systemd.manager.ASK_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "private"))
        listener.listen()
        assert SystemdFacts().describe_manager() is None
