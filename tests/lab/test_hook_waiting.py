# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit of a hook's freeze waits from prepare on. The command runs in it, or it goes with the attempt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.guest import Pending
from tests.lab.host import Host

UNIT = "kho-hook-early.service"
EARLY = """\
freeze = ["/bin/sh", "-c", "exec >> /run/froze; echo $PPID; readlink /proc/$$/fd/0; ls /proc/$$/fd; \
echo $KHO_NAME $KHO_VERB $WORD"]
thaw = ["/bin/sh", "-c", "echo thawed >> /run/froze"]
timeout = 60
[service]
Environment = ["WORD=word"]
"""
# Its prepare lasts until it is told how to end.
LATE = """\
prepare = ["/bin/sh", "-c", "touch /run/asked; until [ -s /run/answer ]; do sleep 0.2; done; exit $(cat /run/answer)"]
after = ["early"]
timeout = 100
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host with khod on it to the whole file."""
    console = tmp_path_factory.mktemp("hook_waiting") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        made = Host(guest)
        guest.put("/etc/kho/producers.d/early.toml", EARLY)
        guest.put("/etc/kho/producers.d/late.toml", LATE)
        made.configure("patient", "[deadlines]\nprepare = 120.0\nfreeze = 60.0\n")
        yield made


@pytest.fixture(autouse=True)
def at_rest(host: Host) -> Iterator[None]:
    """Hold after each case that khod is idle, and that nothing of a hook is left."""
    host.shell("rm -f /run/froze /run/asked /run/answer")
    yield
    status = host.settled()
    assert (status["phase"], status["left"], status["not_undone"]) == ("idle", [], [])
    assert host.hook_leftovers() == ("", "")


@contextmanager
def waiting(host: Host, answer: int = 0) -> Iterator[tuple[str, Pending]]:
    """Activate, and stay where the unit waits: its main process, and khoctl, which goes on at the end with `answer`."""
    activating = host.guest.start(["sh", "-c", "khoctl activate; echo $?"])
    host.shell("timeout 90 sh -c 'until [ -e /run/asked ]; do sleep 0.1; done'")
    assert host.shell(f"systemctl is-active {UNIT}").strip() == "active"
    pid = host.shell(f"systemctl show -P MainPID {UNIT}").strip()
    assert host.shell(f"cat /proc/{pid}/comm").strip() == "sh"
    yield pid, activating
    host.shell(f"echo {answer} > /run/answer")


def froze(host: Host) -> list[str]:
    return host.shell("cat /run/froze 2>/dev/null || true").split()


MEANWHILE: dict[str, Callable[[Host], object]] = {
    "nothing": lambda _host: None,
    "reload": lambda host: host.shell("systemctl daemon-reload"),
    # khod is connected again: the exit code of a command that ends before that is lost, and counts as a veto.
    "reexec": lambda host: host.shell(
        'systemctl daemon-reexec; timeout 60 sh -c \'until grep -q " 0001 03 .* /run/systemd/private" /proc/net/unix; '
        "do sleep 0.1; done'"
    ),
    "no bus": lambda host: host.shell("systemctl stop dbus.socket dbus.service"),
    "busy": Host.occupy_systemd,
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_freeze_runs_below_the_process_that_waited(host: Host, meanwhile: str) -> None:
    with waiting(host) as (pid, activating):
        MEANWHILE[meanwhile](host)
    assert activating.wait().stdout.split()[-1] == "0"
    host.shell("systemctl start dbus.socket")
    assert froze(host) == [pid, "/dev/null", "0", "1", "2", "early", "freeze", "word"]
    host.khoctl("abort")
    assert froze(host)[-1] == "thawed"


def test_where_it_was_killed_freeze_has_a_unit_of_its_own(host: Host) -> None:
    with waiting(host) as (_, activating):
        host.shell(f"systemctl kill --signal=SIGKILL {UNIT}")
    assert activating.wait().stdout.split()[-1] == "0"
    assert froze(host) == ["1", "/dev/null", "0", "1", "2", "early", "freeze", "word"], "once"
    host.khoctl("abort")


def test_a_veto_leaves_nothing_that_waits(host: Host) -> None:
    with waiting(host, 1) as (pid, activating):
        pass
    assert activating.wait().stdout.split()[-1] == "3"
    assert froze(host) == []
    assert not host.shell(f"ps -o comm= {pid} || true")


def test_a_khod_that_is_killed_leaves_nothing_that_waits(host: Host) -> None:
    restarts = int(host.shell("systemctl show -P NRestarts kho-handover"))
    with waiting(host) as (pid, activating):
        host.shell("systemctl kill --kill-whom=main --signal=SIGKILL kho-handover")
        host.shell(f"timeout 30 sh -c 'while [ -e /proc/{pid} ]; do sleep 0.1; done'")
        again = f'"$(systemctl show -P NRestarts kho-handover)" -gt {restarts}'
        host.shell(f"timeout 90 sh -c 'until [ {again} ] && systemctl -q is-active kho-handover; do sleep 0.2; done'")
    activating.wait()
    host.shell("timeout 30 sh -c 'while systemctl -q is-active kho-hook-late; do sleep 0.1; done'")
    assert froze(host) == []
