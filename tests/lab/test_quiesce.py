# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rest of the host is stopped before the producers are frozen, and runs again whenever the handover ends here.

One guest serves the cases of a host that stays up: each must leave its units as it found them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.host import Host, image
from tests.lab.quiescing import VERSION, WORKER, describe_quiesce, producer, start_host, unchanged, write_to_disk

HANGS = f"{WORKER}ExecStop=/bin/sleep 300\nTimeoutStopSec=8\n"
DIES = """\
import asyncio, os, signal, threading
from pathlib import Path
from khod.abi.calls import HostCalls
from khod.kernel.filesystems import FrozenFileSystems, read_note
from khod.producers.transient import TransientUnits
from khod.quiesce.thaw_guard import ThawGuard

async def main():
    filesystems = FrozenFileSystems(HostCalls(), Path("/run/khod/frozen-filesystems"))
    log = open("/tmp/dies.log", "w")  # in memory
    assert await ThawGuard(TransientUnits(), filesystems).start()
    filesystems.freeze_all(threading.Event())
    print("FROZEN", *read_note(filesystems.note), file=log, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host to the whole file, with units of all kinds that quiesce meets."""
    console = tmp_path_factory.mktemp("quiesce") / "console.log"
    with start_host(lab_disk, console) as found:
        yield found


def test_plan_names_what_is_stopped_and_a_veto_at_freeze_starts_it_again(host: Host) -> None:
    with producer(host), unchanged(host):
        does = describe_quiesce(host)
        for name in ("worker.service", "restarts.service", "ticker.timer", "listener.socket"):
            assert name in does
        for name in ("once.service", "needed.service", "dbus", "systemd-journald", "kho-handover"):
            assert name not in does, does
        began = host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value worker.service")
        kept = host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value needed.service")
        refused = host.khoctl("kexec", *image(VERSION), code=3).stderr
        assert "one" in refused
        assert host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value worker.service") != began
        assert host.shell("systemctl show -p ExecMainStartTimestampMonotonic --value needed.service") == kept


def test_the_file_systems_are_thawed_where_khod_dies_at_the_jump(host: Host) -> None:
    """The next khod could not: systemd calls mkdir(2) for its sandbox, which waits for ever on a frozen root."""
    host.guest.put("/tmp/dies.py", DIES)
    host.guest.run(["python3", "/tmp/dies.py"], check=False)
    host.shell("timeout 20 sh -c 'while [ -e /run/khod/frozen-filesystems ]; do sleep 0.1; done'")
    write_to_disk(host)
    assert "FROZEN /" in host.guest.get("/tmp/dies.log").decode()
    assert host.shell("systemctl list-units --plain --no-legend 'kho-thaw-guard*'") == ""


def test_a_unit_that_hangs_in_its_stop_is_refused_and_everything_runs_again(host: Host) -> None:
    host.guest.put("/usr/lib/systemd/system/hangs.service", HANGS)
    host.shell("systemctl daemon-reload; systemctl start hangs.service")
    with producer(host, 'freeze = ["/bin/touch", "/run/frozen"]\n'), unchanged(host):
        said = host.khoctl("kexec", *image(VERSION), code=3).stderr
        assert "hangs.service" in said
        assert "TimeoutStopSec" in said
        host.configure("impatient", "[deadlines]\nquiesce = 6.0\n")
        said = host.khoctl("kexec", *image(VERSION), code=3).stderr
        assert "hangs.service" in said
        assert "6 s" in said
    host.shell("test ! -e /run/frozen; rm /etc/kho/khod.toml.d/impatient.toml; systemctl reload kho-handover")
    host.shell(
        "systemctl stop hangs.service --no-block; systemctl kill -s KILL hangs.service; systemctl stop hangs.service"
    )
    host.shell("rm /usr/lib/systemd/system/hangs.service; systemctl daemon-reload")


@pytest.mark.parametrize(
    ("begin", "end", "word"),
    [
        ("systemd-run --unit=passing sleep infinity", "systemctl stop passing", "passing.service: transient"),
        ("systemctl mask --runtime -q worker", "systemctl unmask --runtime -q worker", "worker.service: masked"),
    ],
)
def test_what_could_not_be_started_again_is_refused_by_the_check(host: Host, begin: str, end: str, word: str) -> None:
    host.shell(begin)
    with unchanged(host):
        assert word in host.checks(code=3)["quiesce"]["evidence"]
    host.shell(end)
    assert host.checks()["quiesce"]["result"] == "passed"


def test_a_reboot_that_fails_thaws_the_file_systems_and_starts_everything_again(host: Host) -> None:
    """The image is unloaded behind khod's back: reboot(2) is EINVAL."""
    with producer(host, 'freeze = ["/sbin/kexec", "-u"]\n'), unchanged(host):
        said = host.khoctl("kexec", *image(VERSION), code=1).stderr
        assert "EINVAL" in said or "Invalid argument" in said
        write_to_disk(host)
