# SPDX-License-Identifier: LGPL-2.1-or-later
"""The collection's playbook rolls real hosts over real SSH, and stops where it must."""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Boot
from tests.lab.host import IMAGES, INITRD
from tests.lab.remote import GATEWAY, RemoteHost, boot_remote
from tests.lab.sshd import make_key
from tests.unit.fleetlock import LOCK, Server, serving
from tests.unit.khods import until
from tests.unit.rolled import PROFILE, Controller

OLD, NEW = "7.3.4", "7.2.12"
FAILED, UNREACHABLE = 2, 4
"""Exit codes of ansible-playbook."""
SECONDS = 900.0
CLAIM = "/var/lib/khod-ansible/claim.json"
PLAYBOOK = "khod.kho.roll"
PROFILE_TEXT = """\
image = "{images}/{version}/bzImage"
initrd = ["{initrd}"]
"""
Fleet = Callable[[int], list[RemoteHost]]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with tempfile.TemporaryDirectory(prefix="kho-") as sockets:  # their paths are short
        controller = Controller(tmp_path / "controller")
        controller.environment |= {
            "ANSIBLE_SSH_CONTROL_PATH_DIR": sockets,
            "ANSIBLE_PRIVATE_KEY_FILE": str(tmp_path / "key"),
            "ANSIBLE_SSH_COMMON_ARGS": f"-F none -o UserKnownHostsFile={tmp_path}/known -o StrictHostKeyChecking=yes",
        }
        yield controller


@pytest.fixture
def fleet(boot: Boot, tmp_path: Path) -> Fleet:
    public = make_key(tmp_path / "key").with_suffix(".pub").read_text()

    def make(number: int) -> list[RemoteHost]:
        hosts = [boot_remote(boot, OLD, public) for _ in range(number)]
        (tmp_path / "known").write_text("".join(host.known_host for host in hosts))
        for host in hosts:
            choose_target(host, NEW)
        return hosts

    return make


def choose_target(host: RemoteHost, version: str) -> None:
    text = PROFILE_TEXT.format(images=IMAGES, version=version, initrd=INITRD)
    host.guest.put(f"/etc/kho/handover.d/{PROFILE}.toml", text)
    host.shell("sync")


def inventory(hosts: list[RemoteHost], **variables: object) -> dict[str, dict[str, Any]]:
    """The hosts h1, h2 …; a variable that begins with the name of one is that host's."""
    found = {}
    for number, host in enumerate(hosts, 1):
        own = {
            name.removeprefix(f"h{number}_"): value
            for name, value in variables.items()
            if name.startswith(f"h{number}_")
        }
        found[f"h{number}"] = {
            "ansible_host": "127.0.0.1",
            "ansible_port": host.port,
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            **own,
        }
    return found


def runs(host: RemoteHost) -> list[str]:
    """The outcomes in its history, the newest first."""
    listed = json.loads(host.khoctl("history", "--json").stdout)["attempts"]
    return [one["outcome"] for one in listed]


def claimed(host: RemoteHost) -> str:
    """The state of its claim."""
    state: str = json.loads(host.guest.get(CLAIM))["state"]
    return state


@pytest.mark.proof
def test_a_host_is_rolled_over_ssh(fleet: Fleet, controller: Controller, tmp_path: Path) -> None:
    """A changed host key, and a host that wants a password, end at once and touch nothing."""
    hosts = fleet(1)
    known = tmp_path / "known"
    right = known.read_text()
    known.write_text(f"[127.0.0.1]:{hosts[0].port} {(tmp_path / 'key.pub').read_text()}")
    changed = controller.play(inventory(hosts))
    assert (changed.code, "Host key verification failed" in changed.out) == (UNREACHABLE, True), changed.out
    known.write_text(right)
    asked = controller.play(inventory(hosts, h1_ansible_user="nobody"))
    assert (asked.code, "Permission denied" in asked.out) == (UNREACHABLE, True), asked.out
    assert runs(hosts[0]) == []

    ended = controller.play(inventory(hosts))
    assert ended.code == 0, ended.out + ended.err
    assert "1 hosts: 1 verified" in ended.out
    assert f"{OLD}-kho -> {NEW}-kho" in ended.out
    assert runs(hosts[0]) == ["verified"]


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_three_hosts_are_rolled_and_each_kind_of_worse_stops_it(fleet: Fleet, controller: Controller) -> None:
    with serving(Server()) as server:
        roll_three_hosts(fleet(3), controller, server)


def roll_three_hosts(hosts: list[RemoteHost], controller: Controller, server: Server) -> None:
    for number, host in enumerate(hosts):  # the guests have one machine id
        text = f'url = "http://{GATEWAY}:{server.server_port}"\ngroup = "workers"\nid = "{number:032x}"\n'
        host.guest.put("/etc/kho/fleetlock.toml", text)
        host.shell("sync")
    hosts[1].shell("date --utc --set=@$(($(date +%s) + 3600))")

    with controller.start(inventory(hosts), PLAYBOOK) as killed:
        try:
            hosts[1].guest.run(["sh", "-c", f"until grep -q begun {CLAIM}; do sleep 0.1; done"], timeout=SECONDS)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
    again = controller.play(inventory(hosts), seconds=SECONDS)
    print(again.out)
    assert again.code == 0, again.out
    assert "3 hosts: 3 verified" in again.out
    assert [runs(host) for host in hosts] == [["verified"]] * 3
    assert server.requests.count(LOCK) >= len(hosts)
    until(lambda: server.holders == [], None)

    choose_target(hosts[1], OLD)
    over = controller.play(inventory(hosts, h2_rolling_blackout_budget=0.1), seconds=SECONDS, rolling_id="over")
    print(over.out)
    assert over.code == FAILED, over.out
    assert "3 hosts: 1 unchanged, 1 over_budget, 1 not_touched" in over.out
    assert [len(runs(host)) for host in hosts] == [1, 2, 1]
    until(lambda: server.holders == [], None)

    choose_target(hosts[1], NEW)
    hosts[1].guest.put("/etc/kho/verify.d/broken.toml", 'command = ["/bin/false"]\n')
    hosts[1].shell("sync")
    worse = controller.play(inventory(hosts), seconds=SECONDS, rolling_id="worse")
    print(worse.out)
    assert worse.code == FAILED, worse.out
    assert "3 hosts: 1 unchanged, 1 degraded, 1 not_touched" in worse.out
    assert [len(runs(host)) for host in hosts] == [1, 3, 1]
    assert [claimed(host) for host in hosts] == ["finished"] * 3
    until(lambda: server.holders == [], None)
