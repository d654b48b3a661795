# SPDX-License-Identifier: LGPL-2.1-or-later
"""Health checks of the operator on a real systemd: each in a unit of its own, bounded, and none is left behind."""

import json

from tests.lab.conftest import Online
from tests.lab.host import Host

VERSION = "7.3.4"
CHECKS = {
    "fine": """command = ["/bin/sh", "-c", 'cat /proc/self/cgroup; test "$KHO_VERB" = verify']""",
    "hangs": 'command = ["/bin/sleep", "1000"]\ntimeout = 3\nneed = "wanted"',
    "prints": 'command = ["/usr/bin/yes"]\ntimeout = 3\nneed = "wanted"',
    "forks": """command = ["/bin/sh", "-c", "sleep 1000 & exit 0"]""",
    "late": """command = ["/usr/bin/systemctl", "is-active", "late.service"]""",
}
LATE = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/sleep 5
[Install]
WantedBy=multi-user.target
"""


def test_health_checks_run_in_units_of_their_own(online: Online) -> None:
    host = Host(online(VERSION))
    host.guest.wait_online()
    for name, text in CHECKS.items():
        host.guest.put(f"/etc/kho/verify.d/{name}.toml", f"{text}\n")
    assert host.checks()["health"]["result"] == "passed"
    host.guest.put("/etc/kho/verify.d/broken.toml", 'command = ["/bin/false"]\ncomand = 1\n')
    refused = host.checks(code=3)["health"]
    assert (refused["result"], "broken.toml:2" in refused["evidence"]) == ("fail", True)
    host.guest.put("/etc/kho/verify.d/broken.toml", 'command = ["/bin/false"]\n')
    host.guest.put("/etc/systemd/system/late.service", LATE)
    host.guest.put("/etc/systemd/system/kho-hooks.service.d/late.conf", "[Unit]\nAfter=late.service\n")
    host.shell("systemctl enable -q late; sync")

    host.kexec(VERSION)

    found = json.loads(host.khoctl("verify", "--json", code=7).stdout)["verdict"]
    results = {check["name"]: check["result"] for check in found["checks"] if check["name"].startswith("health ")}
    wanted = {
        "fine": "passed",
        "hangs": "warn",
        "prints": "warn",
        "forks": "passed",
        "late": "passed",
        "broken": "fail",
    }
    assert results == {f"health {name}": result for name, result in wanted.items()}
    (finding,) = found["findings"]
    assert (finding["source"], finding["subject"]) == ("health", "broken")
    assert "kho-verify-fine.service" in host.shell("journalctl -b -u kho-handover -o cat")
    assert host.shell("systemctl list-units --all --plain --no-legend 'kho-verify-*'").strip() == ""
    assert host.shell("pgrep -x sleep || true").strip() == ""
