# SPDX-License-Identifier: LGPL-2.1-or-later
"""The collection's playbook on hosts of the simulated kernel: whatever goes wrong, the next host is not touched."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.khods import until
from tests.unit.rolled import PLAYBOOK_SECONDS, PROFILE, Controller, RolledHost, give_past

FAILED, UNREACHABLE = 2, 4
"""Exit codes of ansible-playbook."""
HISTORY = 5
"""How many handovers a host with a history has had."""

Rolled = Callable[..., list[RolledHost]]


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path)


@pytest.fixture
def rolled(tmp_path: Path) -> Iterator[Rolled]:
    made: list[RolledHost] = []

    def make(number: int, *, past: float | None = None) -> list[RolledHost]:
        """Make hosts; with `past`, each has a history of handovers with a blackout of so many seconds."""
        for one in range(number):
            directory = tmp_path / f"h{one + 1}"
            if past is not None:
                give_past(directory, blackout=past, attempts=HISTORY)
            made.append(RolledHost(directory))
        return made

    yield make
    for host in made:
        host.close()


def inventory(hosts: list[RolledHost]) -> dict[str, dict[str, Any]]:
    return {host.name: host.inventory for host in hosts}


def starts(hosts: list[RolledHost]) -> list[int]:
    return [host.starts for host in hosts]


def claim(host: RolledHost) -> dict[str, Any]:
    path = host.directory / "claim/claim.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


@pytest.mark.proof
def test_three_hosts_are_rolled_and_nothing_is_done_twice(controller: Controller, rolled: Rolled) -> None:
    hosts = rolled(3)
    hooks = {name: controller.directory / name for name in ("drain", "undrain")}
    commands: dict[str, Any] = {
        f"rolling_{name}_command": ["sh", "-c", f"echo {{{{ inventory_hostname }}}} >>{path}"]
        for name, path in hooks.items()
    }
    first = controller.play(inventory(hosts), **commands)
    assert first.code == 0, first.out + first.err
    assert starts(hosts) == [1, 1, 1]
    assert "3 hosts: 3 verified" in first.out
    assert all(f"{host.name}    verified  6.8.0-kho-v3-simulated -> 6.8.0-next" in first.out for host in hosts)
    assert [claim(host)["state"] for host in hosts] == ["finished"] * 3
    asked = [host.khoctl("history", "-n", "1", "--json").json["attempts"][0] for host in hosts]
    assert all(attempt["by"].startswith("root (") and "by profile weekly" in attempt["by"] for attempt in asked)
    for path in hooks.values():
        assert path.read_text().split() == ["h1", "h2", "h3"]

    again = controller.play(inventory(hosts))
    assert (again.code, starts(hosts)) == (0, [1, 1, 1]), again.out
    assert "changed=0" in again.out.replace("changed=1", "CHANGED")

    other = controller.play(inventory(hosts), rolling_id="second")
    assert (other.code, starts(hosts)) == (0, [1, 1, 1]), other.out
    assert "3 hosts: 3 unchanged" in other.out


@pytest.mark.parametrize(
    ("fault", "value", "outcome"),
    [
        ("lose", True, "degraded"),
        pytest.param("cold", True, "cold_boot", marks=pytest.mark.proof),
        pytest.param("load_errno", 12, "rolled_back", marks=pytest.mark.proof),
    ],
)
def test_a_host_that_is_worse_off_stops_the_roll_out(
    controller: Controller, rolled: Rolled, fault: str, value: object, outcome: str
) -> None:
    hosts = rolled(3)
    hosts[1].kernel.set_fault(fault, value)
    ended = controller.play(inventory(hosts))
    assert ended.code == FAILED, ended.out
    assert starts(hosts) == [1, 1, 0]
    assert f"The roll-out stops here. h2: {outcome}." in ended.out
    assert f"3 hosts: 1 verified, 1 {outcome}, 1 not_touched" in ended.out
    assert (claim(hosts[1])["state"], claim(hosts[2])) == ("finished", {})


@pytest.mark.proof
def test_one_host_over_the_budget_stops_the_roll_out(controller: Controller, rolled: Rolled) -> None:
    hosts = rolled(2)
    ended = controller.play(inventory(hosts), rolling_blackout_budget=0.001)
    assert ended.code == FAILED, ended.out
    assert "h1: over_budget. The blackout was 0." in ended.out
    assert starts(hosts) == [1, 0]


@pytest.mark.proof
def test_a_host_that_is_not_drained_is_undrained_and_not_touched(controller: Controller, rolled: Rolled) -> None:
    """Tried again by the same roll-out, once it can be drained."""
    hosts = rolled(2)
    undrained, open_now = controller.directory / "undrained", controller.directory / "open"
    hooks: dict[str, Any] = {
        "rolling_drain_command": ["test", "-e", str(open_now)],
        "rolling_undrain_command": ["sh", "-c", f"echo {{{{ inventory_hostname }}}} >>{undrained}"],
    }
    ended = controller.play(inventory(hosts), **hooks)
    assert ended.code == FAILED, ended.out
    assert "2 hosts: 1 drain_failed, 1 not_touched" in ended.out
    assert (starts(hosts), undrained.read_text()) == ([0, 0], "h1\n")

    open_now.touch()
    again = controller.play(inventory(hosts), **hooks)
    assert again.code == 0, again.out
    assert starts(hosts) == [1, 1]


@pytest.mark.proof
def test_a_batch_that_is_slower_than_its_history_stops_the_roll_out(controller: Controller, rolled: Rolled) -> None:
    """Five hosts that never had a blackout this long: p is 6 to the power of -5."""
    hosts = rolled(6, past=0.000_1)
    ended = controller.play(inventory(hosts), options=["--forks=5"], rolling_serial=[5, 1])
    assert ended.code == FAILED, ended.out
    assert "are longer than those of the history" in ended.out
    assert starts(hosts) == [1, 1, 1, 1, 1, 0]


def test_a_killed_controller_is_started_anew(controller: Controller, rolled: Rolled) -> None:
    """It is killed while the second host is on its way, and not reached: nothing is begun twice."""
    hosts = rolled(3)
    remote = {host.name: host.remote for host in hosts}
    hosts[1].kernel.set_fault("slow_serialize", 10)
    process = controller.start(remote)
    until(lambda: hosts[1].starts == 1, process, seconds=PLAYBOOK_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert claim(hosts[1])["state"] == "begun"

    other = controller.play(inventory(hosts[1:]), rolling_id="other")
    assert other.code == FAILED, other.out
    assert "h2: claimed. Roll-out first" in other.out
    assert "has this host, in state begun, and nothing was touched" in other.out

    again = controller.play(remote)
    assert again.code == 0, again.out
    assert "3 hosts: 3 verified" in again.out
    assert starts(hosts) == [1, 1, 1]


def test_a_host_without_khod_is_counted_apart(controller: Controller, rolled: Rolled) -> None:
    hosts = rolled(1)
    bare = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
    ended = controller.play({"h0": bare, **inventory(hosts)})
    assert ended.code == UNREACHABLE, ended.out
    assert "2 hosts: 1 no_kho, 1 verified" in ended.out
    assert "Skipped: no_kho. khoctl is not installed" in ended.out
    assert starts(hosts) == [1]


def test_a_host_that_is_not_reached_is_not_touched(controller: Controller, rolled: Rolled) -> None:
    """Nobody listens at this port: ssh asks nothing, and the roll-out ends at its canary."""
    hosts = rolled(1)
    away = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    ended = controller.play({"h0": away, **inventory(hosts)}, rolling_connect_timeout=3)
    assert ended.code == UNREACHABLE, ended.out
    assert starts(hosts) == [0]


def write_playbook(controller: Controller, *tasks: Mapping[str, object]) -> str:
    path = controller.directory / "playbook.yml"
    path.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": list(tasks)}]))
    return str(path)


def hand_over(name: str, **arguments: object) -> dict[str, object]:
    task = {"khod.kho.kho_handover": {"profile": PROFILE, **arguments}, "register": name, "ignore_errors": True}
    return task | {"name": name}


def hold(*conditions: str) -> dict[str, object]:
    return {"ansible.builtin.assert": {"that": list(conditions)}}


def test_check_mode_is_the_plan_and_then_the_handover_is_made_once(controller: Controller, rolled: Rolled) -> None:
    hosts = rolled(1)
    check = write_playbook(controller, {"khod.kho.kho_check": {"profile": PROFILE}}, hand_over("planned"))
    ended = controller.play(inventory(hosts), check, ["--check", "--diff"])
    assert ended.code == 0, ended.out
    assert starts(hosts) == [0]
    for line in ("-kernel 6.8.0-kho-v3-simulated", "+kernel 6.8.0-next", "+next=1", " root=/dev/sim"):
        assert ended.out.count(f"\n{line}\n") == 2, ended.out
    assert "changed=2" in ended.out

    whole = controller.play(inventory(hosts), options=["--check"])
    assert (whole.code, starts(hosts), claim(hosts[0])) == (0, [0], {}), whole.out
    assert "1 hosts: 1 planned" in whole.out

    real = write_playbook(
        controller,
        hand_over("first"),
        hold("first is changed", "first.outcome == 'verified'", "first.kernel == '6.8.0-next'"),
        hold("first.blackout_seconds > 0", "first.blackout_error_seconds > 0", "first.verdict.missing == []"),
        hold("first.report.attempt.summary.run == first.run"),
        hand_over("second"),
        hold("second is not changed", "second is not failed", "second.outcome == 'unchanged'"),
        hand_over("gone", profile="gone"),
        hold("gone is failed", "gone.outcome == 'refused'", "'There is no profile' in gone.msg"),
    )
    ended = controller.play(inventory(hosts), real)
    assert ended.code == 0, ended.out
    assert starts(hosts) == [1]


def test_a_check_that_fails_refuses(controller: Controller, rolled: Rolled) -> None:
    hosts = rolled(1)
    (hosts[0].directory / "image").write_bytes(b"no kernel")
    playbook = write_playbook(
        controller,
        hand_over("refused"),
        hold(
            "refused is failed", "refused.outcome == 'refused'", "'A handover would be refused. image:' in refused.msg"
        ),
    )
    ended = controller.play(inventory(hosts), playbook)
    assert ended.code == 0, ended.out
    assert starts(hosts) == [0]
