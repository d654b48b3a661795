# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules and the dashboard in packaging/prometheus, held against what khod exports; by promtool, without a guest."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.metrics.table import METRICS, MetricFacts
from khod.metrics.text import PREFIX, render_text
from khod.model import Phase
from tests.unit.khods import REPOSITORY
from tests.unit.monitored import ARRIVED, COUNTS, LAST, STATES

DIRECTORY = REPOSITORY / "packaging/prometheus"
RULES = DIRECTORY / "kho.rules.yml"
DASHBOARD = DIRECTORY / "kho-dashboard.json"
EXPORTED = {PREFIX + metric.name for metric in METRICS}
RECORDED = set(re.findall(r"record: (\S+)", RULES.read_text()))
ALERTS = set(re.findall(r"alert: (\S+)", RULES.read_text()))
NAMES = re.compile(r"(?<![\w:])(?:[a-z]+:)?kho[_:][\w:]+")
"""A metric or a recorded series in an expression."""
GOOD = MetricFacts(
    replace(ARRIVED, phase=Phase.verified, outcome=Phase.verified, claims=[], verdict=None),
    COUNTS,
    replace(LAST, outcome=Phase.verified, blackout_seconds=6.8),
)
MINUTES, DAY_MINUTES = 60, 26 * 60
"""How long a state stays: for every `for`, and for a day's increase."""


def with_status(**changes: Any) -> MetricFacts:
    return replace(GOOD, status=replace(GOOD.status, **changes))


def with_blackout(seconds: float, error: float) -> MetricFacts:
    assert GOOD.last is not None
    return replace(GOOD, last=replace(GOOD.last, blackout_seconds=seconds, blackout_error_seconds=error))


FIRING = {
    "failed": (with_status(phase=Phase.failed), "KhoNotRolledBack"),
    "not undone": (with_status(not_undone=STATES["not undone"].status.not_undone), "KhoNotRolledBack"),
    "inconsistent": (with_status(phase=Phase.inconsistent), "KhoInconsistent"),
    "degraded": (with_status(outcome=Phase.degraded), "KhoArrivedDegraded"),
    "cold": (with_status(outcome=Phase.cold_boot), "KhoArrivedDegraded"),
    "waiting": (with_status(claims=["db"]), "KhoStateWaits"),
    "foreign": (with_status(foreign=True), "KhoForeign"),
    "stale": (with_status(stale=True), "KhoStatusStale"),
    "slow": (with_blackout(9.0, 0.004), "KhoBlackoutSlow"),
}
"""A host in trouble, and the alert for it."""


def series(hosts: Mapping[str, MetricFacts]) -> Iterator[dict[str, str]]:
    """What Prometheus has of these hosts, each value for MINUTES."""
    for host, facts in hosts.items():
        for line in render_text(facts).splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                labels = name.partition("{")[2].rstrip("}")
                named = f'{name.partition("{")[0]}{{instance="{host}",job="node"{"," if labels else ""}{labels}}}'
                yield {"series": named, "values": f"{value}x{MINUTES}"}


def promtool(
    tmp_path: Path, inputs: list[dict[str, str]], expected: Mapping[str, Mapping[str, float]], minutes: int = MINUTES
) -> None:
    """Hold what each expression comes to, at the end, against values by their labels."""
    asked = [
        {
            "expr": expression,
            "eval_time": f"{minutes - 1}m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in values.items()],
        }
        for expression, values in expected.items()
    ]
    case = {"interval": "1m", "input_series": inputs, "promql_expr_test": asked}
    file = tmp_path / "test.json"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": [case]}))
    ended = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_promtool_takes_the_rules() -> None:
    ended = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{len(RECORDED) + len(ALERTS)} rules found" in ended.stdout


def test_every_name_is_exported_or_recorded() -> None:
    asked = {name for file in (RULES, DASHBOARD) for name in NAMES.findall(file.read_text())}
    assert asked - EXPORTED - RECORDED == set()
    assert len(asked & EXPORTED) > 10
    assert asked >= RECORDED


def test_every_alert_is_for_a_host_that_is_in_trouble_and_for_no_other(tmp_path: Path) -> None:
    hosts = {f"good{number}": with_blackout(6.8 + number / 100, 0.004) for number in range(12)}
    hosts |= {name: facts for name, (facts, _alert) in FIRING.items()}
    hosts["unsure"] = with_blackout(9.0, 1.5)
    expected = {f'{{alertname="{alert}", instance="{name}"}}': 1.0 for name, (_facts, alert) in FIRING.items()}
    promtool(tmp_path, list(series(hosts)), {'count by (alertname, instance) (ALERTS{alertstate="firing"})': expected})
    assert {alert for _facts, alert in FIRING.values()} == ALERTS - {"KhoHandoversFail"}


@pytest.mark.parametrize(("failed", "fires"), [(30, True), (3, False)])
def test_failing_handovers_raise_an_alarm(tmp_path: Path, failed: int, fires: bool) -> None:
    """Over a day, of 100 handovers some fail."""
    inputs = [
        {
            "series": f'kho_handovers_total{{instance="web",outcome="{outcome}"}}',
            "values": f"0+{count / DAY_MINUTES}x{DAY_MINUTES}",
        }
        for outcome, count in (("verified", 100 - failed), ("rolled_back", failed))
    ]
    firing = {'{alertname="KhoHandoversFail"}': 1.0} if fires else {}
    asked = {'count by (alertname) (ALERTS{alertstate="firing"})': firing}
    promtool(tmp_path, inputs, asked, DAY_MINUTES)


def test_the_recorded_series_are_those_of_the_fleet(tmp_path: Path) -> None:
    hosts = {f"web{number}": with_blackout(5.0 + number, 0.5) for number in range(5)}
    expected = {
        "release:kho_hosts:count": {'release:kho_hosts:count{release="7.3.4"}': 5.0},
        "kho:last_blackout_seconds:median": {"kho:last_blackout_seconds:median": 7.0},
        "kho:last_blackout_seconds:max": {"kho:last_blackout_seconds:max": 9.0},
        "max(instance:kho_last_blackout:ratio)": {"{}": 8.5 / 7.0},
        'outcome:kho_boots:count{outcome="verified"}': {'outcome:kho_boots:count{outcome="verified"}': 5.0},
    }
    promtool(tmp_path, list(series(hosts)), expected)


def expressions() -> Iterator[str]:
    """The dashboard's queries, as Grafana would send them."""
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [one["expr"] for one in board["annotations"]["list"]]
    for expression in asked:
        yield expression.replace("$instance", ".*").replace("$__interval", "5m")


def test_every_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    """Each is valid, and finds something in a fleet that has everything."""
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    file = tmp_path / "panels.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    ended = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    inputs = list(series({f"web{number}": STATES["arrived"] for number in range(5)}))
    asked = {f"absent({text})": dict[str, float]() for text in expressions() if "changes(" not in text}
    promtool(tmp_path, inputs, asked)


def test_panels_have_a_place_of_their_own() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _y in cells) < 24
