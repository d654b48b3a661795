# SPDX-License-Identifier: LGPL-2.1-or-later
"""How exact the undo of quiesce is: units of all kinds of ties run afterwards as before, and nothing has run twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.host import Host, image
from tests.lab.quiescing import VERSION, WORKER, producer, start_host, unchanged

COUNTED = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo x >> /run/counted'\n"
ENABLED = "[Install]\nWantedBy=multi-user.target\n"
SLOW = "[Service]\nType=notify\nExecStart=/bin/sleep infinity\nTimeoutStartSec=1\nRestart=always\nRestartSec=1h\n"
UNITS = {
    "ends-host.service": f"[Unit]\nSuccessAction=reboot\n{WORKER}",
    "run-data.mount": "[Unit]\nStopWhenUnneeded=yes\n[Mount]\nWhat=tmpfs\nWhere=/run/data\nType=tmpfs\n",
    "uses-data.service": f"[Unit]\nRequires=run-data.mount\nAfter=run-data.mount\n{WORKER}",
    "by-hand.service": WORKER,
    "counted.service": COUNTED,
    "wants.service": f"[Unit]\nWants=by-hand.service counted.service\n{WORKER}",
    "limited.service": f"[Unit]\nStartLimitBurst=1\nStartLimitIntervalSec=1h\n{WORKER}{ENABLED}",
    "since-boot.timer": "[Timer]\nOnBootSec=1s\nUnit=counted.service\n",
    "every-day.timer": "[Timer]\nOnBootSec=1s\nOnUnitActiveSec=1d\nUnit=counted.service\n",
    "slow.service": SLOW,
    "named.service": f"{WORKER}[Install]\nAlias=nick.service\n",
    "unfit.service": f"[Unit]\nConditionPathExists=!/run/unfit\n{WORKER}",
    "upheld.service": WORKER,
    "upholds.service": f"[Unit]\nDefaultDependencies=no\nUpholds=upheld.service\n{WORKER}",
}
RUNNING = (
    "ends-host uses-data wants limited since-boot.timer every-day.timer named unfit upholds"  # upheld comes by itself
)
REFUSES = """\
keep = ["nick.service"]
freeze = ["/bin/sh", "-c", "touch /run/unfit; false"]
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give a host on which all of them run."""
    console = tmp_path_factory.mktemp("undo") / "console.log"
    with start_host(lab_disk, console) as found:
        for name, text in UNITS.items():
            found.guest.put(f"/usr/lib/systemd/system/{name}", text)
        found.shell(
            f"systemctl daemon-reload; systemctl enable -q named limited; systemctl start {RUNNING};"
            "systemctl start --no-block slow; echo kept > /run/data/file;"
            "timeout 60 sh -c 'until systemctl is-active -q upheld; do sleep 0.2; done';"
            "timeout 60 sh -c 'until [ $(systemctl show -P SubState slow) = auto-restart ]; do sleep 0.2; done';"
            "timeout 60 sh -c 'while systemctl list-jobs | grep -q counted || systemctl is-active -q counted;"
            " do sleep 0.2; done'; systemctl stop by-hand"
        )
        yield found


def test_an_odd_host_is_as_it_was_after_a_refusal(host: Host) -> None:
    properties = "systemctl show -P MainPID named ends-host upheld; cat /run/counted /run/data/file; mount | grep data"
    before = host.shell(properties)
    with producer(host, REFUSES), unchanged(host):
        said = host.khoctl("kexec", *image(VERSION), code=3).stderr
        (left,) = [line for line in said.splitlines() if "Not running again: " in line]
        assert "slow.service (it fails, and systemd tries again)" in left
        assert "unfit.service (its conditions do not hold)" in left
        host.shell("rm /run/unfit; systemctl start unfit")
    assert host.shell(properties) == before
    assert host.shell("systemctl is-active by-hand", check=False) == "inactive\n"
    assert host.shell("ls /run/khod | grep thaw-guard || true") == ""


def test_a_poweroff_that_waits_for_a_program_is_not_turned_into_a_jump(host: Host) -> None:
    """The last one: the host goes down. systemd does not know of the request while logind lets `delay` locks wait."""
    delays = "systemd-inhibit --what=shutdown --mode=delay sleep 60"
    host.shell(f"systemctl start systemd-logind; systemctl stop slow; systemd-run -q {delays}")
    host.shell("timeout 60 sh -c 'until ls /run/systemd/inhibit/*.ref; do sleep 0.2; done'")
    kept = 'keep = ["run-*.service", "systemd-logind.service", "dbus.service"]\n'
    host.guest.put("/etc/kho/producers.d/one.toml", f'{kept}freeze = ["/usr/bin/systemctl", "poweroff"]\n')
    said = host.khoctl("kexec", *image(VERSION), code=3).stderr
    assert "Somebody has begun to shut the host down" in said, said
