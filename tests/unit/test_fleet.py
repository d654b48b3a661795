# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many hosts as one table and one page: inventories, exported histories, who stands out, and what a host may send."""

import json
import math
import os
import random
import re
import xml.dom.minidom
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from khoctl.fleet import assess, collect, inventory
from khoctl.fleet.model import HostView, RemarkKind
from khoctl.fleet.table import render_fleet
from khoctl.render import as_json
from khoctl.report.fleet import write_fleet_page
from khod.client.history import History
from khod.errors import Exit, UsageError
from khod.history.model import AttemptSummary
from khod.model import Generation, Phase
from tests.unit.khods import Answer, cli
from tests.unit.monitored import BARE, HOSTILE, LAST

VERIFIED = replace(LAST, outcome=Phase.verified, reason="", blackout_seconds=6.8, blackout_error_seconds=0.004)
HERE = replace(BARE, phase=Phase.verified, outcome=Phase.verified, generation=Generation.stateless, stale=False)


def export(path: Path, *attempts: AttemptSummary, **status: object) -> None:
    """Write what khoctl wrote on a host: the status, if some of it is given, and the history."""
    lines = [as_json(replace(HERE, **status))] if status else []  # type: ignore[arg-type]
    path.write_text("\n".join([*lines, as_json(History(list(attempts)))]) + "\n")


def fleet(tmp_path: Path, *words: str) -> Answer:
    return cli(tmp_path / "socket", "fleet", "status", "--from", str(tmp_path), *words)


def host(name: str, *blackouts: float, error: float = 0.004) -> HostView:
    attempts = [replace(VERIFIED, blackout_seconds=one, blackout_error_seconds=error) for one in blackouts]
    return HostView(name=name, state="verified", kernel="7.3.4", khod="0.1.0", attempts=attempts)


def kinds(found: Sequence[HostView]) -> dict[str, list[RemarkKind]]:
    return {one.name: [remark.kind for remark in one.remarks] for one in found if one.remarks}


INVENTORIES = {
    "list": ("# a fleet\nroot@web1  # the first\n\nweb2\nweb2\n", ["root@web1", "web2"]),
    "ini": (
        "web0 ansible_host=10.0.0.1\n[web]\nweb[01:03] ansible_user=root ansible_port=2222\n; no host\n"
        "[db]\ndb-[8:9].example\n[db:vars]\nansible_user = admin\n[all:children]\nweb\ndb\n",
        [
            "10.0.0.1",
            *(f"ssh://root@web{number:02}:2222" for number in (1, 2, 3)),
            "admin@db-8.example",
            "admin@db-9.example",
        ],
    ),
    "ansible-inventory": (
        json.dumps(
            {
                "_meta": {"hostvars": {"a": {"ansible_host": "10.0.0.2", "ansible_port": 22}}},
                "all": {"children": ["web", "ungrouped"]},
                "web": {"hosts": ["a", "b"]},
            }
        ),
        ["ssh://10.0.0.2:22", "b"],
    ),
}


@pytest.mark.parametrize("kind", INVENTORIES)
def test_an_inventory_names_its_hosts(tmp_path: Path, kind: str) -> None:
    text, destinations = INVENTORIES[kind]
    (tmp_path / "inventory").write_text(text)
    found = inventory.read_inventory(str(tmp_path / "inventory"))
    assert [member.destination for member in found] == destinations


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody\n",
        "-oProxyCommand=x\n",
        "web ansible_host=-v\n",
        "web1 web2\n",
        "web'\n",
        "{",
        '{"web": {"hosts": 5}}',
        '{"web": 5}',
        "[" * 9,
        "{" * 100_000,
        "web[1:99999999]\n",
        "web[1:9999][1:9999]\n",
        "web[1:3:0]\n",
        "\0\n",
    ],
)
def test_a_broken_inventory_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "inventory").write_text(text)
    ended = cli(tmp_path / "socket", "fleet", "status", "-i", tmp_path / "inventory")
    assert (ended.code, ended.out) == (Exit.usage, ""), ended


def test_who_is_not_named_is_not_asked(tmp_path: Path) -> None:
    for words in ([], ["--from", tmp_path / "nothing"], ["-i", tmp_path / "nothing"], ["--", "-v"]):
        assert cli(tmp_path / "socket", "fleet", "status", *words).code == Exit.usage


def test_what_needs_a_person_comes_first(tmp_path: Path) -> None:
    export(tmp_path / "a-good.json", VERIFIED, phase=Phase.verified)
    export(tmp_path / "b-busy.json", VERIFIED, phase=Phase.preparing, run="0123")
    export(tmp_path / "c-back.json", replace(VERIFIED, outcome=Phase.idle, reason="db said no"))
    export(tmp_path / "d-cold.json", replace(VERIFIED, outcome=Phase.cold_boot, reason="panic"))
    export(tmp_path / "e-degraded.json", outcome=Phase.degraded, exit_code=7)
    export(tmp_path / "f-stuck.json", VERIFIED, phase=Phase.failed, exit_code=6, last_error="disk is gone")
    export(tmp_path / "g-bare.json", generation=Generation.none)
    export(tmp_path / "h-other.json", VERIFIED, phase=Phase.foreign, foreign=True, exit_code=3)
    (tmp_path / "i-cut.json").write_text('{"attempts": [')
    ended = fleet(tmp_path)
    assert ended.code == Exit.not_rolled_back
    rows = [line.split()[0] for line in ended.out.split("\n\n")[0].splitlines()[1:]]
    order = ["f-stuck", "e-degraded", "d-cold", "h-other", "i-cut", "c-back", "b-busy", "a-good"]
    assert rows == order, ended.out
    assert "Without KHO\n  g-bare" in ended.out
    assert "db said no" in ended.out
    assert [one["name"] for one in fleet(tmp_path, "--json").json["fleet"]["hosts"]] == [
        *order[:6],
        "b-busy",
        "g-bare",
        "a-good",
    ]


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("verified", {"phase": Phase.verified}, Exit.done),
        ("degraded", {"outcome": Phase.degraded}, Exit.degraded),
        ("foreign", {"foreign": True}, Exit.refused),
        ("waiting", {"claims": ["db"]}, Exit.refused),
        ("without", {"generation": Generation.none}, Exit.unsupported),
        ("busy", {"phase": Phase.loaded}, Exit.done),
    ],
)
def test_the_exit_code_is_that_of_the_worst(tmp_path: Path, name: str, status: dict[str, object], code: Exit) -> None:
    export(tmp_path / f"{name}.json", VERIFIED, **status)
    assert fleet(tmp_path).code == code
    export(tmp_path / "other.json", VERIFIED, generation=Generation.none)
    assert fleet(tmp_path).code == (code or Exit.unsupported)


def test_a_budget_and_the_others_make_a_host_stand_out() -> None:
    hosts = [host(f"web{number}", 6.8 + number / 100) for number in range(9)]
    assert assess.assess_fleet(hosts).exit_code == Exit.done
    assert kinds(assess.assess_fleet([*hosts, host("slow", 7.9)]).hosts) == {"slow": [RemarkKind.slow]}
    assert not kinds(assess.assess_fleet([*hosts, host("unsure", 7.9, error=1.0)]).hosts)
    assert not kinds(assess.assess_fleet([*hosts, host("mended", 6.8, 7.9)]).hosts), "the last one counts"
    assert not kinds(assess.assess_fleet([*hosts[:3], host("few", 7.9)]).hosts), "too few to compare"
    found = assess.assess_fleet([*hosts, host("slow", 7.9)], budget=7.0)
    assert kinds(found.hosts) == {"slow": [RemarkKind.over_budget, RemarkKind.slow]}
    assert found.exit_code == Exit.refused


def test_clean_fleets_are_not_slow_and_a_slow_host_is_found() -> None:
    drawn = random.Random(17)
    hosts = [[host(f"web{number}", drawn.gauss(6.8, 0.1)) for number in range(100)] for _fleet in range(20)]
    assert not [kinds(assess.assess_fleet(one).hosts) for one in hosts if kinds(assess.assess_fleet(one).hosts)]
    slow = host("slow", 6.8 * 1.2)
    assert all(kinds(assess.assess_fleet([*one, slow]).hosts) == {"slow": [RemarkKind.slow]} for one in hosts)


def test_the_distribution_is_that_of_all_blackouts() -> None:
    found = assess.measure_spread([host("a", 1.0, 2.0), host("b", 3.0, 4.0, 5.0, error=0.5), host("c")])
    assert found is not None
    assert (found.count, found.hosts, found.median, found.worst, found.worst_host) == (5, 2, 3.0, 5.0, "b")
    assert (found.lower_quartile, found.upper_quartile, found.error_seconds) == (2.0, 4.0, 0.5)
    assert assess.measure_spread([host("c")]) is None


HOSTILE_FILES: dict[str, dict[str, object]] = {
    "numbers": {"blackout_seconds": 1e308, "blackout_error_seconds": -1, "began_at": -5.0, "ended_at": 1e300},
    "large numbers": {"blackout_seconds": 10**400, "ended_at": 10**400},
    "not numbers": {"blackout_seconds": math.nan, "blackout_error_seconds": math.inf, "ended_at": math.inf},
    "texts": {"reason": HOSTILE * 999, "to_release": HOSTILE, "run": HOSTILE, "by": HOSTILE, "from_release": "x" * 999},
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_what_a_host_sends_is_bounded_and_escaped(tmp_path: Path, name: str) -> None:
    outcomes = {"outcome": "cold_boot", "refused": False}
    attempt = {**json.loads(as_json(VERIFIED)), **HOSTILE_FILES[name], **outcomes}
    (tmp_path / "\x1b[2J<b>.json").write_text(json.dumps({"attempts": [attempt]}))
    export(tmp_path / "good.json", VERIFIED, phase=Phase.verified)
    ended = fleet(tmp_path)
    assert ended.code == Exit.degraded
    assert "\x1b" not in ended.out
    assert max(map(len, ended.out.splitlines())) < 500
    json.loads(fleet(tmp_path, "--json").out, parse_constant=pytest.fail)
    page = tmp_path / "page.html"
    written = cli(tmp_path / "socket", "fleet", "report", "--from", str(tmp_path), "--html", page)
    assert written.code == Exit.degraded
    text = page.read_text()
    xml.dom.minidom.parseString(text.partition("\n")[2].encode())
    assert "<script" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "5", '"attempts"', "[" * 100_000, "\0", "{" * 9, "{}"),
        *('{"a": 1}', '{"attempts": 5}', '{"attempts": {"a": 1}}', '{"attempts": null}', '{"attempts": [{}]}'),
    ],
)
def test_a_file_that_is_none_of_khoctl_s_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "web.json").write_text(text)
    export(tmp_path / "good.json", VERIFIED)
    ended = fleet(tmp_path)
    assert ended.code == Exit.unreachable
    assert "web  unreadable: It is not what khoctl writes with --json" in ended.out
    assert "good" in ended.out
    assert not re.search("__init__|slice|NoneType|iterable|recursion", ended.out), "words of Python's"


def test_a_file_that_is_no_regular_one_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "web.json")
    export(tmp_path / "good.json", VERIFIED)
    ended = fleet(tmp_path)
    assert (ended.code, "web  unreadable: The file is a FIFO" in ended.out) == (Exit.unreachable, True)


def test_a_budget_is_a_number(tmp_path: Path) -> None:
    export(tmp_path / "good.json", VERIFIED)
    ended = fleet(tmp_path, "--budget", "nan")
    assert (ended.code, "nan is not a budget" in ended.err) == (Exit.usage, True)


def test_a_variable_of_an_inventory_may_have_no_value(tmp_path: Path) -> None:
    variables = {"ansible_host": None, "ansible_user": None, "ansible_port": None}
    (tmp_path / "hosts").write_text(json.dumps({"_meta": {"hostvars": {"web": variables}}}))
    assert inventory.read_inventory(str(tmp_path / "hosts")) == [inventory.FleetMember("web", "web")]


def test_a_table_fits_its_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(9):
        export(tmp_path / f"web{number}.json", replace(VERIFIED, outcome=Phase.cold_boot, reason="word " * 40))
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, fleet(tmp_path).out.splitlines())) <= 80


def test_a_fleet_of_one_kind_is_a_short_page() -> None:
    page = render_fleet(assess.assess_fleet([host("a", 6.8), host("b", 6.9)]), 80)
    assert "Stand out" not in page
    assert "7.3.4 on 2" in page


def test_an_empty_fleet_has_a_page_too() -> None:
    bare = collect.describe_host("bare", BARE, [])
    text = write_fleet_page(assess.assess_fleet([bare]))
    assert "No host has Kexec HandOver" in text


def test_a_yaml_inventory_needs_ansible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts.yml").write_text("all: {hosts: {web1: {ansible_user: root}}}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="ansible-inventory"):
        inventory.read_inventory(str(tmp_path / "hosts.yml"))
    listed = json.dumps({"_meta": {"hostvars": {"web1": {"ansible_user": "root"}}}, "all": {"hosts": ["web1"]}})
    (tmp_path / "ansible-inventory").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "ansible-inventory").chmod(0o755)
    assert [one.destination for one in inventory.read_inventory(str(tmp_path / "hosts.yml"))] == ["root@web1"]
