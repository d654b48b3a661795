# SPDX-License-Identifier: LGPL-2.1-or-later
"""Health checks of the operator on a real systemd: each in a unit of its own, bounded, and none is left behind.

The handover before them is that of a profile, in its unit, with its commands before and after.
"""

import json

from tests.lab.conftest import Online
from tests.lab.host import IMAGES, INITRD, Host

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
PROFILE = """\
image = "{image}"
initrd = "{initrd}"
load_only = {load_only}
blackout_budget = 600.0
[window]
timezone = "UTC"
[hooks]
before = {before}
after = [["/bin/sh", "-c", "env | grep ^KHO_ > /root/after.new"], ["mv", "/root/after.new", "/root/after"], ["sync"]]
"""


def write_profile(host: Host, *, before: str = '["true"]', load_only: str = "false") -> None:
    """Write the profile `roll`, and forget what its command after a handover has left."""
    image = f"{IMAGES}/{VERSION}/bzImage"
    text = PROFILE.format(image=image, initrd=INITRD, load_only=load_only, before=before)
    host.guest.put("/etc/kho/handover.d/roll.toml", text)
    host.shell("rm -f /root/after")


def read_after(host: Host) -> tuple[str, str]:
    """The verdict and the exit code that the command after the handover was given, once it has run."""
    text = host.shell("timeout 120 sh -c 'until test -e /root/after; do sleep 0.2; done'; cat /root/after")
    host.shell("timeout 60 sh -c 'while test -e /var/lib/kho-profiles/roll.json; do sleep 0.2; done'")  # all have run
    found = dict(line.partition("=")[::2] for line in text.splitlines())
    assert (found["KHO_NAME"], found["KHO_ASKED_BY"][:6]) == ("roll", "root (")
    return found["KHO_VERDICT"], found["KHO_EXIT_CODE"]


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

    write_profile(host, before='["/bin/sh", "-c", "echo not now >&2; exit 1"]')
    assert "exited with 1: not now" in host.khoctl("handover", "roll", code=3).stderr
    assert read_after(host) == ("refused", "3")
    write_profile(host, load_only="true")
    host.khoctl("handover", "roll")
    host.khoctl("abort")
    assert read_after(host) == ("rolled_back", "1")  # by kho-after@roll.service
    write_profile(host)
    host.shell("sync")
    assert host.guest.kexec(argv=("khoctl", "handover", "roll")).how == "kexec"

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
    assert read_after(host) == ("degraded", "7")
    assert host.shell("ls /var/lib/kho-profiles").strip() == ""
    attempt = json.loads(host.khoctl("history", "show", "--json").stdout)
    assert (attempt["terms"]["profile"], attempt["terms"]["blackout_budget"]) == ("roll", 600.0)
    assert ", by profile roll that root (" in attempt["summary"]["by"]
