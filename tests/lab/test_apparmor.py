# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod and its scanner in their AppArmor profiles: all they do is granted, the rest refused, and hooks run outside.

The lab's 7.3.4 has AppArmor on, so every scenario on that kernel runs like this one.
"""

import json

import pytest

from tests.lab.conftest import Online
from tests.lab.host import Host, image
from tests.lab.store import check_arrived, fill, start_store

VERSION = "7.3.4"
MEBIBYTES = 1
LABEL = "/proc/self/attr/apparmor/current"
UNITS = {"khod": "kho-handover.service", "kho-sessions": "kho-sessions.service"}

HOOK = f"""\
prepare = ["cp", "{LABEL}", "/run/label"]
thaw = ["rm", "-f", "/run/frozen"]
freeze = ["touch", "/run/frozen"]
"""
TICKER = "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n"

ATTEMPTS = """\
import json, os, socket, subprocess

def write(path):
    with open(path, "w") as file:
        file.write("x")

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def execute(*argv):
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

def answer(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return os.strerror(error.errno)
    return "done"

calls = {
    "write the state": (write, "/var/lib/khod/attempt"),
    "write /etc": (write, "/etc/attempt"),
    "write the configuration": (write, "/etc/kho/khod.toml.d/attempt.toml"),
    "read the configuration": (read, "/etc/kho/khod.toml"),
    "read passwords": (read, "/etc/shadow"),
    "read a key": (read, "/root/.ssh/id"),
    "read a disk": (read, "/dev/vda"),
    "make a socket": (socket.socket, socket.AF_UNIX),
    "list the open files of PID 1": (os.listdir, "/proc/1/fd"),
    "read the environment of PID 1": (read, "/proc/1/environ"),
    "read passwords through PID 1": (read, "/proc/1/root/etc/shadow"),
    "execute systemctl": (execute, "systemctl", "--version"),
    "execute a shell": (execute, "/bin/sh", "-c", "true"),
    "execute Python": (execute, "/usr/bin/python3", "-c", ""),
    "reach the network": (socket.socket, socket.AF_INET),
}
print(json.dumps({name: answer(*call) for name, call in calls.items()}))
"""
ENFORCED = {name: f"{name} (enforce)" for name in UNITS}
GRANTED = {
    "khod": {
        "write the state",
        "read the configuration",
        "make a socket",
        "list the open files of PID 1",
        "execute systemctl",
    },
    "kho-sessions": {"make a socket", "list the open files of PID 1"},
}


def labels(host: Host) -> dict[str, str]:
    """Give what all threads of each run in, as the kernel has it; the scanner runs from khod's first question on."""
    label = "cat /proc/$(systemctl show -P MainPID {unit})/task/*/attr/apparmor/current | sort -u"
    return {name: host.shell(label.format(unit=unit)).strip() for name, unit in UNITS.items()}


def denied(host: Host) -> list[str]:
    """Give what either was denied in all boots: the console has the kernel's log of the shutdowns too."""
    lines = host.guest.console().splitlines() + host.dmesg().splitlines()
    return [line for line in lines if 'apparmor="DENIED"' in line and 'profile="kho' in line]


def arrived(host: Host, digest: str) -> None:
    """Hold that everything came over, into a khod that is confined again."""
    host.guest.wait_online()
    check_arrived(host, digest, MEBIBYTES)
    assert labels(host) == ENFORCED


def test_nothing_that_khod_does_is_denied(online: Online) -> None:
    host = Host(online(VERSION))
    start_store(host)
    digest = fill(host, MEBIBYTES)
    host.guest.put("/etc/systemd/system/ticker.service", TICKER)
    host.guest.put("/etc/kho/producers.d/ticker.toml", 'unit = "ticker.service"\n')
    host.guest.put("/etc/kho/producers.d/hook.toml", HOOK)
    host.shell("systemctl daemon-reload; systemctl enable -q --now ticker; sync")

    assert host.checks()["producers"]["result"] == "passed"
    assert labels(host) == ENFORCED
    host.khoctl("plan", *image(VERSION))
    host.khoctl("activate")
    assert host.shell("cat /run/label").strip() == "unconfined"
    assert host.shell("systemctl show -P FreezerState ticker").strip() == "frozen"
    assert host.status()["run"] in host.khoctl("dt", "list").stdout
    for tree in ("out", "snapshot"):
        host.khoctl("dt", "show", tree)
    host.khoctl("abort")
    host.shell("systemctl reload kho-handover")

    host.khoctl("kexec", *image(VERSION), "--load-only")
    host.khoctl("activate")
    host.shell("systemctl kill --kill-whom=main --signal=SIGKILL kho-handover")
    assert host.settled()["phase"] == "idle"
    assert host.word("/sys/kernel/kexec_loaded") == "0"
    assert host.shell("ls /run/frozen", check=False) == ""
    assert labels(host) == ENFORCED

    host.kexec(VERSION)
    arrived(host, digest)
    assert host.guest.kexec(argv=("khoctl", "kexec", *image(VERSION), "--now")).how == "kexec"
    arrived(host, digest)
    assert denied(host) == []


@pytest.mark.parametrize("profile", UNITS)
def test_what_no_profile_grants_is_denied(online: Online, profile: str) -> None:
    host = Host(online(VERSION))
    host.guest.put("/root/.ssh/id", "a key\n", mode=0o600)

    run = ["systemd-run", "--quiet", "--pipe", "--wait", f"--property=AppArmorProfile={profile}"]
    answers = json.loads(host.guest.run([*run, "python3", "-I", "-c", ATTEMPTS]).stdout)

    assert {name for name, answer in answers.items() if answer == "done"} == GRANTED[profile]
    assert set(answers.values()) == {"done", "Permission denied"}
    log = "".join(denied(host))
    assert all(f'profile="{profile}" name="{path}"' in log for path in ("/etc/shadow", "/root/.ssh/id"))


def test_a_khod_without_its_profile_runs_and_is_not_denied_it(online: Online) -> None:
    host = Host(online(VERSION))
    host.shell(
        "systemctl mask -q --now kho-apparmor; apparmor_parser --remove /etc/apparmor.d/khod;"
        "systemctl restart kho-handover"
    )
    assert host.status()["phase"] == "idle"
    assert labels(host)["khod"] == "unconfined"
    assert 'apparmor="DENIED"' not in host.dmesg()
    host.shell("apparmor_parser --replace /etc/apparmor.d/khod; systemctl restart kho-handover")
    assert labels(host)["khod"] == ENFORCED["khod"]
