# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user without rights, a member of kho-producers and a hostile hook try what they can, beyond their rights."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from khod.wire import SOCKET
from tests.lab import attempts
from tests.lab import kernels as lab_kernels
from tests.lab.conftest import usual
from tests.lab.guest import Pending
from tests.lab.host import Host

UNIT = "kho-handover.service"
PRODUCERS = "/etc/kho/producers.d"
GROUPS = "/sys/fs/cgroup/system.slice"
KHOD_GROUP = "/sys/fs/cgroup/kho.slice/kho-handover.service"
AWAY = "/sys/fs/cgroup/away"
NORMAL = 'freeze = ["/bin/true"]\n'
# Waits in prepare until it may go on, and says which process it is.
HELD = """
timeout = 400
prepare = ["/bin/sh", "-c", "echo $$ > /run/held; until [ -e /run/shared/go ]; do sleep 0.2; done"]
"""
SLOW = "[deadlines]\nprepare = 400\nfreeze = 400\n[producers]\nmax_per_user = 20\n"
MANY = 20
TRY = 'cd /; python3 /lab/attempts.py all "$(cat /run/spec)" > /run/shared/new; mv /run/shared/new /run/shared/found'
SETTINGS = """
[service]
User = "daemon"
NoNewPrivileges = true
ProtectSystem = "strict"
ReadWritePaths = ["/run", "/var/own"]
CapabilityBoundingSet = []
"""
MEMBER = '--groups="$(getent group kho-producers | cut -d: -f3)"'
USERS = {
    "nobody": "setpriv --reuid=65534 --regid=65534 --clear-groups",
    "member": f"setpriv --reuid=4001 --regid=4001 {MEMBER}",
    "hook": "",
}
"""How each becomes who it is; a hook is it by the settings of its file."""
REFUSED = {"nobody": {"EACCES", "EPERM"}, "member": {"EACCES", "EPERM"}, "hook": {"EACCES", "EPERM", "EROFS", "EXDEV"}}
NO_RIGHTS = "Refused denied"
ASKS_NOBODY = "--no-ask-password"
DENIED = ".*(denied|required).*"
COMMANDS = {
    **{
        f"systemctl {ASKS_NOBODY} {verb} {unit}": f"[14] Failed to .*{unit}: {DENIED}"
        for verb, unit in [
            *((verb, UNIT) for verb in ("start", "stop", "restart", "reload", "kill", "freeze", "clean")),
            *((verb, "kho-hook-held.service") for verb in ("start", "stop", "kill", "freeze")),
            ("stop", "kho-handover.socket"),
            ("start", "kho-handover@x.service"),
        ]
    },
    f"systemd-run {ASKS_NOBODY} --unit=kho-hook-normal /bin/true": f"1 Failed to start transient service.*{DENIED}",
    "systemd-run --user --unit=kho-hook-normal /bin/true": "1 Failed to connect to user scope bus .*",
    "khoctl abort --force": "3 khoctl: User [0-9]+ may not abort .*",
    "setpriv --reuid=0 /bin/true": "127 setpriv: .* Operation not permitted",
    "mkdir /etc/hostile": "1 mkdir: .*(Permission denied|Read-only file system)",
}
"""What each prints, with its exit code before it."""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host with khod on it to the whole file."""
    console = tmp_path_factory.mktemp("hostile") / "console.log"
    with usual(lab_kernels.find("7.3.4"), lab_disk, console) as guest:
        made = Host(guest)
        guest.put("/lab/attempts.py", Path(attempts.__file__).read_bytes())
        guest.put(f"{PRODUCERS}/normal.toml", NORMAL)
        # The message bus hangs up on a user that has no name.
        made.shell("echo 'u hostile 4001' | systemd-sysusers -")
        made.shell(f"mkdir {AWAY}; install -m 4755 /usr/bin/id /var/as-root; mkdir /run/own /var/own")
        made.configure("slow", SLOW)
        yield made


@pytest.fixture(autouse=True)
def at_rest(host: Host) -> Iterator[None]:
    """Hold after each case that khod is the same and idle, that no hook is left, and that a handover goes on."""
    before = host.shell(f"systemctl show -p MainPID,NRestarts,NFileDescriptorStore {UNIT}")
    host.shell("rm -rf /run/shared; mkdir -m 777 /run/shared")
    yield
    host.shell(f"cd {PRODUCERS}; rm -f held.toml hostile.toml")
    host.khoctl("activate")
    status = json.loads(host.khoctl("abort", "--json").stdout)
    assert (status["phase"], status["left"], status["not_undone"]) == ("idle", [], [])
    assert host.shell(f"systemctl show -p MainPID,NRestarts,NFileDescriptorStore {UNIT}") == before
    units = host.shell("systemctl list-units --all --plain --no-legend 'kho-hook-*'")
    processes = host.shell(f"cat {GROUPS}/kho-hook-*/cgroup.procs 2>/dev/null || true")
    assert (units, processes, sleepers(host)) == ("", "", [])


def show(host: Host, name: str) -> str:
    """Give a property of khod's unit."""
    return host.shell(f"systemctl show -P {name} {UNIT}").strip()


def sleepers(host: Host) -> list[str]:
    return host.shell("pgrep -af '^(sleep|yes) 7[0-9]{3}$' | cut -d' ' -f2- || true").splitlines()


def activating(host: Host, waits_for: str) -> Pending:
    """Begin to activate, until there is such a file."""
    pending = host.guest.start(["khoctl", "activate"])
    wait_file(host, waits_for)
    return pending


def wait_file(host: Host, path: str) -> None:
    host.guest.run(["timeout", "300", "sh", "-c", f"until [ -s {path} ]; do sleep 0.2; done"], timeout=310)


def allow(host: Host) -> None:
    host.shell("echo > /run/shared/go")


def as_member(mode: str, *words: str, uid: int = 4001) -> str:
    """Give the command line that runs the attempts as a member of kho-producers."""
    return f"setpriv --reuid={uid} --regid={uid} {MEMBER} python3 /lab/attempts.py {shlex.join([mode, *words])}"


def printed(text: str) -> None:
    """Hold that a text is lines of a bounded length for a terminal."""
    assert all(line.isprintable() and len(line) < 2000 for line in text.splitlines()), text[:5000]


def spec(host: Host, uid: int) -> dict[str, Any]:
    """What is tried: every file of khod's with a directory of the user's in the same file system, every process."""
    found = host.shell("find /run/khod /var/lib/khod /etc/kho; echo /run/varlink/registry/io.kho.Handover").splitlines()
    host.shell(f"rm -rf /run/own/* /var/own/*; touch /run/own/file; chown -R {uid} /run/own /var/own")
    groups = [
        f"{group}/cgroup.{name}"
        for group in (KHOD_GROUP, f"{GROUPS}/kho-hook-held.service")
        for name in ("procs", "kill", "freeze")
    ]
    return {
        "files": {path: "/run/own" if path.startswith("/run") else "/var/own" for path in [*found, "/run/own/file"]},
        "groups": [*groups, f"{AWAY}/cgroup.procs", "/run/systemd/private"],
        "processes": {
            "khod": int(show(host, "MainPID")),
            "hook": int(host.word("/run/held")),
        },
        "commands": [command.split() for command in (*COMMANDS, "/var/as-root -u")],
    }


@pytest.mark.parametrize(
    "user", [pytest.param(user, marks=[pytest.mark.proof] if user == "hook" else []) for user in USERS]
)
def test_nobody_changes_what_is_not_theirs(host: Host, user: str) -> None:
    uid = {"nobody": 65534, "member": 4001, "hook": 1}[user]
    host.shell("rm -f /run/held /run/spec")
    host.guest.put(f"{PRODUCERS}/held.toml", HELD)
    if user == "hook":
        host.guest.put("/run/try", f"until [ -e /run/spec ]; do sleep 0.2; done\n{TRY}")
        told = 'timeout = 400\nprepare = ["/bin/sh", "/run/try"]'
        host.guest.put(f"{PRODUCERS}/hostile.toml", f"{told}\n{SETTINGS}")
    activation = activating(host, "/run/held")
    try:
        host.guest.put("/run/spec.new", json.dumps(spec(host, uid)))
        host.shell("mv /run/spec.new /run/spec")
        if user != "hook":
            host.guest.run(["sh", "-c", f"exec {USERS[user]} sh -c {shlex.quote(TRY)}"], timeout=300)
        wait_file(host, "/run/shared/found")
        status, kept = show(host, "StatusText"), show(host, "NFileDescriptorStore")
    finally:
        allow(host)
        ended = activation.wait(300)
    host.khoctl("abort")

    found = json.loads(host.shell("cat /run/shared/found"))
    assert (ended.rc, kept) == (0, "0"), ended.stderr
    assert status.startswith("Producers are getting ready"), status
    assert found["methods"].pop("Attempt") in ("done", "UsageError")  # everyone may read; at first there is none
    changing = {name: end for name, end in found["methods"].items() if name not in attempts.READERS}
    allowed = (
        {"Next": "Refused", "Register": "KhoError"} if user == "member" else {"Next": "Refused"}
    )  # no `name` is given
    assert changing == {name: allowed.get(name, NO_RIGHTS) for name in changing}
    assert {"Activate", "Abort", "Kexec", "Register", "Check an image"} <= set(changing)
    assert {found["methods"][name] for name in attempts.READERS} == {"done"}
    own = found["files"].pop("/run/own/file")
    assert set(own.values()) == {"done"}
    for path, ends in found["files"].items():
        read = ends.pop("read")
        public = path.startswith("/etc/") or path in (
            "/run/khod",
            SOCKET,
            "/run/varlink/registry/io.kho.Handover",
        )
        assert read == ("done" if public else "EACCES"), path
        assert set(ends.values()) <= REFUSED[user], (path, ends)
    assert len(found["files"]) > 10
    assert set(found["groups"].values()) <= REFUSED[user] - {"EXDEV"}, found["groups"]
    assert set(found["own process"].values()) == {"done"}
    for name, ends in found["processes"].items():
        assert set(ends.values()) <= {"EACCES", "EPERM"}, (name, ends)
    assert found["notify"].pop("forged") == "EPERM"
    assert set(found["notify"].values()) == {"done"}, "anyone may send; nothing came of it, see above"
    assert found["commands"].pop("/var/as-root -u") == ("0 1" if user == "hook" else "0 0")
    for command, end in found["commands"].items():
        assert re.fullmatch(COMMANDS[command], end), (command, end)


def test_root_may_what_the_others_may_not(host: Host) -> None:
    """Else the refusals above would say nothing."""
    pid = show(host, "MainPID")
    host.shell(
        "systemd-run -q --wait --unit=kho-hook-normal /bin/true; systemctl reload kho-handover;"
        f"NOTIFY_SOCKET={attempts.NOTIFY} systemd-notify --pid={pid} --status=forged"
    )
    assert show(host, "StatusText") == "forged"
    assert host.khoctl("abort", "--force").rc == 0


def test_a_member_speaks_for_itself_only(host: Host) -> None:
    def trying(*names: str, uid: int = 4001) -> dict[str, str]:
        found: dict[str, str] = json.loads(host.shell(as_member("producer", json.dumps({"names": names}), uid=uid)))
        return found

    theirs = host.guest.start(["sh", "-c", f"exec {as_member('theirs', uid=4002)}"])
    wait_file(host, "/run/shared/registered")
    activation = activating(host, "/run/shared/preparing")
    try:
        found = trying("mine", "systemd", "normal", "theirs")
        shown = {one["name"]: one for one in json.loads(host.khoctl("producers", "--json").stdout)}
        allow(host)
        wait_file(host, "/run/shared/left")
        taken = [trying("theirs", uid=uid)["theirs"] for uid in (4001, 4002)]
        phase = host.status()["phase"]
    finally:
        host.shell("pkill -f '^python3 /lab/attempts.py theirs'")
        ended = activation.wait(300)
    assert theirs.wait().rc != 0
    assert found.pop("mine") == "done"
    assert found.pop("an owner") == "KhoError"  # no such parameter
    assert found.pop("forged") == "EPERM"
    assert {name for name, end in found.items() if end == "Refused"} == {"normal", "theirs", "unregistered", "twice"}
    assert {end for name, end in found.items() if end != "Refused"} == {"UsageError"}
    assert (shown["theirs"]["phase"], shown["theirs"]["waiting"]) == ("prepare", True)
    assert (taken, phase) == (["Refused", "Refused"], "rolling_back")
    assert (ended.rc, "theirs" in ended.stderr) == (3, True)


def test_a_member_s_words_and_calls_are_bounded(host: Host) -> None:
    host.guest.start(["sh", "-c", f"exec {as_member('rude')}"])
    wait_file(host, "/run/shared/registered")
    activation = activating(host, "/run/shared/preparing")
    flood = host.guest.start(["sh", "-c", as_member("flood", str(MANY), uid=4003)])
    wait_file(host, "/run/shared/flooding")
    pages = [host.khoctl(*words).stdout for words in (["status"], ["producers"])]
    host.shell("echo > /run/shared/enough")
    flooded = flood.wait(300)
    allow(host)
    ended = activation.wait(300)

    for text in (*pages, ended.stdout, ended.stderr, show(host, "StatusText")):
        printed(text)
    assert all("idle: all is well" in text for text in (*pages, ended.stderr))
    assert ended.rc == 3
    assert json.loads(flooded.stdout) == {"registered": str(MANY), "last": "Refused", "gone": "6"}
    messages = [json.loads(line)["MESSAGE"] for line in host.shell(f"journalctl -u {UNIT} -o json").splitlines()]
    for message in messages:
        assert isinstance(message, str), message  # a list of bytes where it is not printable
        printed(message)


SEES = """\
for fd in /proc/$$/fd/*; do [ ! -e $fd ] || fds="$fds ${fd##*/}"; done
tr '\\0' '\\n' < /proc/$$/environ > /run/seen
echo "fds$fds" >> /run/seen
export NOTIFY_SOCKET=/run/systemd/notify
systemd-notify --status=hostile; systemd-notify --stopping; systemd-notify --fd=0 --fdname=hostile < /dev/zero
printf 'not the last\\n\\033[2J\\033]0;x\\007\\342\\200\\256no\\n' >&2
exit 1
"""
LEAVES = """\
trap '' TERM INT HUP
setsid env -i sleep 7001 &
(setsid sh -c 'exec <&- >&- 2>&-; sleep 7002 & sleep 7003' &)
sleep 7004 & kill -KILL $!
yes 7005 &
exec >&- 2>&-
while :; do sleep 7006; done
"""
MOVES = f"""\
[ "$AGAIN" ] || AGAIN=1 exec /bin/sh -c 'eval "$(cat /run/hostile)"'
sh -c 'echo $$ > {AWAY}/cgroup.procs
until [ -e /run/shared/go ]; do sleep 0.2; done
trap "" PIPE; echo late || echo refused > /run/late; exec sleep 7011' &
until grep -q . {AWAY}/cgroup.procs; do :; done
"""
MOVES_ITSELF = f"""\
sleep 7021 &
echo $$ > {AWAY}/cgroup.procs
sleep 7022 &
exec sleep 7023
"""


@pytest.mark.parametrize(
    ("script", "answer", "survive"),
    [
        (SEES, "refuses to freeze: ?[2J?]0;x??no", []),
        (LEAVES, "did not answer freeze within 8 s", []),
        (MOVES, "", ["sleep 7011"]),
        (MOVES_ITSELF, "did not answer freeze within 20 s", ["sleep 7022"]),
    ],
    ids=["sees", "leaves", "moves", "moves-itself"],
)
def test_a_hook_turned_hostile(host: Host, script: str, answer: str, survive: list[str]) -> None:
    """It is root, and may move a process to another control group: khod does not find that one again."""
    host.guest.put("/run/hostile", script)
    host.guest.put(
        f"{PRODUCERS}/hostile.toml",
        # The unit of the last one must be prepared in time: its hook is not the unit's main process then.
        f"timeout = {20 if script == MOVES_ITSELF else 8}\n"
        "freeze = ['/bin/sh', '-c', 'eval \"$(cat /run/hostile)\"']\n",
    )
    try:
        ended = host.khoctl("producers", "test", "hostile", code=3 if answer else 0)
        printed(ended.stderr)
        assert answer in ended.stderr
        if script == MOVES:
            allow(host)
            wait_file(host, "/run/late")
            host.shell("timeout 60 sh -c \"until pgrep -f '^sleep 7011'; do sleep 0.2; done\"")
            assert host.word("/run/late") == "refused"
        assert sleepers(host) == survive
    finally:
        host.shell(f"echo 1 > {AWAY}/cgroup.kill")
    if script == SEES:
        seen = host.shell("cat /run/seen").splitlines()
        assert {"fds 0 1 2", "KHO_VERB=freeze"} <= set(seen)
        assert not [line for line in seen if line.startswith(("NOTIFY_SOCKET", "LISTEN_", "WATCHDOG"))]
        assert "hostile" not in show(host, "StatusText")
