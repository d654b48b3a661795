# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod killed in the middle of a hook, a message bus that is dead, a PID 1 that is busy: everything is rolled back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.host import Host

# Notes each verb, and stays at the one that /run/at names the first time; what it started left its session.
SCRIPT = """\
#!/bin/sh
echo "$KHO_VERB begins" >> /run/told
if [ "$KHO_VERB" = "$(cat /run/at)" ] && mkdir /run/once; then
    setsid env -i sleep 7000 &
    exec sleep 7001
fi
echo "$KHO_VERB ends" >> /run/told
"""
HOOK = "timeout = 60\n" + "".join(f'{verb} = ["/run/hook"]\n' for verb in ("prepare", "freeze", "thaw", "cancel"))
TOLD = {
    "prepare": ["prepare begins", "cancel begins", "cancel ends"],
    "freeze": ["prepare", "freeze begins", "thaw", "cancel"],
    "thaw": ["prepare", "freeze", "thaw begins", "thaw", "cancel"],
    "cancel": ["prepare", "freeze", "thaw", "cancel begins", "thaw", "cancel"],
}
"""What it is told; an undo that was under way is told again from its beginning."""
PROOF = ("prepare", "cancel")


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host with khod on it to the whole file."""
    console = tmp_path_factory.mktemp("hook_units") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        made = Host(guest)
        made.guest.put("/run/hook", SCRIPT, mode=0o755)
        made.guest.put("/etc/kho/producers.d/one.toml", HOOK)
        yield made


@pytest.fixture(autouse=True)
def at_rest(host: Host) -> Iterator[None]:
    """Hold after each case that khod is idle, and that nothing of a hook is left."""
    host.shell("rm -rf /run/told /run/once; echo none > /run/at")
    yield
    status = host.settled()
    assert (status["phase"], status["left"], status["not_undone"]) == ("idle", [], [])
    nothing_is_left(host)


def nothing_is_left(host: Host) -> None:
    assert (*host.hook_leftovers(), host.shell("pgrep -f '^sleep 700' || true").strip()) == ("", "", "")


def told(host: Host) -> list[str]:
    return host.shell("cat /run/told").splitlines()


def whole(*words: str) -> list[str]:
    """Both lines of each verb, one alone where it is given with what it did."""
    return [line for word in words for line in ([word] if " " in word else [f"{word} begins", f"{word} ends"])]


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[pytest.mark.proof] if verb in PROOF else []) for verb in TOLD]
)
def test_khod_killed_in_the_middle_of_a_hook_ends_it_and_puts_everything_back(host: Host, verb: str) -> None:
    host.shell(f"echo {verb} > /run/at")
    restarts = int(host.shell("systemctl show -P NRestarts kho-handover"))
    asking = host.guest.start(["sh", "-c", "khoctl activate; khoctl abort"])
    host.shell("timeout 120 sh -c \"until pgrep -f '^sleep 7001'; do sleep 0.1; done\"")

    host.shell("systemctl kill --kill-whom=main --signal=SIGKILL kho-handover")

    again = f'"$(systemctl show -P NRestarts kho-handover)" -gt {restarts}'
    host.shell(f"timeout 90 sh -c 'until [ {again} ] && systemctl -q is-active kho-handover; do sleep 0.2; done'")
    assert host.settled()["phase"] == "idle"
    asking.wait()  # its abort is not to meet the next case
    found = told(host)
    assert found[: len(whole(*TOLD[verb]))] == whole(*TOLD[verb]), found


def test_a_dead_message_bus_keeps_nobody_frozen(host: Host) -> None:
    host.shell("systemd-run -q --unit=ticker sleep infinity")
    host.guest.put("/etc/kho/producers.d/ticker.toml", 'unit = "ticker.service"\n')
    host.khoctl("activate")
    assert host.shell("systemctl show -P FreezerState ticker").strip() == "frozen"
    host.shell("systemctl stop dbus.socket dbus.service")
    try:
        host.khoctl("abort")
        assert told(host)[-4:] == whole("thaw", "cancel")
        assert host.shell("systemctl show -P FreezerState ticker").strip() == "running"
    finally:
        host.shell("systemctl start dbus.socket; rm /etc/kho/producers.d/ticker.toml; systemctl stop ticker")


def test_a_systemd_that_is_busy_is_waited_for(host: Host) -> None:
    host.khoctl("activate")
    host.occupy_systemd()
    host.khoctl("abort")
    assert told(host)[-4:] == whole("thaw", "cancel")


# What systemd 262 made of the settings, as the command itself sees it.
SEEN = """\
#!/bin/sh
exec > /run/seen
cat "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max"
nice
sed -n 's/^ *\\(.*\\):.*/\\1/p' /proc/net/dev | tr '\\n' ' '
echo
echo "$WORD"
id -un
touch /var/lib/written 2>/dev/null && echo written || echo kept out
"""
SETTINGS = """\
freeze = ["/run/seen-by"]
[service]
MemoryMax = "64M"
Nice = 5
PrivateNetwork = true
Environment = ["WORD=one two"]
User = "daemon"
ProtectSystem = "strict"
ReadWritePaths = ["/run"]
CapabilityBoundingSet = ["CAP_KILL"]
SystemCallFilter = ["@system-service"]
RuntimeMaxSec = "1min"
TasksMax = 20
"""


def test_a_hook_has_the_settings_of_its_file(host: Host) -> None:
    host.guest.put("/run/seen-by", SEEN, mode=0o755)
    host.shell("chmod 777 /run; touch /run/seen; chmod 666 /run/seen")
    host.guest.put("/etc/kho/producers.d/set.toml", SETTINGS)
    try:
        host.khoctl("activate")
        host.khoctl("abort")
        memory, nice, links, word, user, wrote = host.shell("cat /run/seen").splitlines()
        assert (memory, nice, links.split(), word) == (str(64 << 20), "5", ["lo"], "one two")
        assert (user, wrote) == ("daemon", "kept out")
    finally:
        host.shell("chmod 755 /run; rm -f /etc/kho/producers.d/set.toml /run/seen")
