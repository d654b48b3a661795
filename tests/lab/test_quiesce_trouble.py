# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may go wrong while the rest of the host is stopped: the handover ends, and the host is as it was.

One guest serves all of it; each scenario must leave its units as it found them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.host import DROP_INS, Host, image
from tests.lab.quiescing import REFUSES, VERSION, WORKER, producer, start_host, unchanged, write_to_disk

KILLS = "/usr/bin/systemctl kill -s KILL kho-handover.service"
NO_REBOOT = "[Service]\nSystemCallFilter=~reboot\n"

# A bus call starts it again while it is stopped: its stop ends once systemd has that from the message bus.
BUS = "org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus"
CALL = f"--expect-reply=no call {BUS} StartServiceByName su org.lab.Poked 0"
HAS_JOB = "systemctl list-jobs | grep -q 'poked.service *start'"
POKED = f"""\
[Service]
Type=dbus
BusName=org.lab.Poked
ExecStart=/usr/bin/python3 /usr/lib/own_name.py
ExecStopPost=/usr/bin/busctl -q {CALL}
ExecStopPost=/bin/sh -c "until {HAS_JOB}; do sleep 0.1; done"
"""
OWN_NAME = """\
import signal
from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import open_dbus_connection
bus = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
connection = open_dbus_connection("SYSTEM")
connection.send_and_get_reply(new_method_call(bus, "RequestName", "su", ("org.lab.Poked", 0)))
signal.pause()
"""
ACTIVATION = "[D-BUS Service]\nName=org.lab.Poked\nExec=/bin/false\nUser=root\nSystemdService=poked.service\n"
POLICY = """\
<busconfig><policy user="root"><allow own="org.lab.Poked"/></policy></busconfig>
"""
LATE = "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/touch /run/late-was-stopped\n"
STARTS_LATE = f"{WORKER}ExecStop=/usr/bin/systemctl start --no-block late.service\n"

STORE_LATE = """\
import os, signal, time
from systemd import daemon
while not os.path.exists("/run/frozen"):
    time.sleep(0.1)
daemon.notify("FDSTORE=1", fds=[os.memfd_create("late")])
signal.pause()
"""
STORES_LATE = """\
[Service]
ExecStart=/usr/bin/python3 /usr/lib/store_late.py
FileDescriptorStoreMax=4
FileDescriptorStorePreserve=yes
"""

# As login(1) and sshd do it with pam_systemd: the process becomes the leader of a session, in a scope of its own.
OPERATOR = """\
import os, signal, subprocess, sys
from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import open_dbus_connection
logind = DBusAddress("/org/freedesktop/login1", "org.freedesktop.login1", "org.freedesktop.login1.Manager")
connection = open_dbus_connection("SYSTEM", enable_fds=True)
session = "", "tty", "user-light", "", "", 0, "", "", False, "", "", []
call = new_method_call(logind, "CreateSession", "uusssssussbssa(sv)", (0, os.getpid(), *session))
reply = connection.send_and_get_reply(call)
print(reply.body, open("/proc/self/cgroup").read(), file=sys.stderr)
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
with open("/run/logged-in", "w") as file:
    print(done.returncode, done.stderr, file=file)
signal.pause()
"""
SESSION = """\
[Service]
ExecStart=/usr/bin/python3 /usr/lib/log_in.py khoctl kexec {words}
"""
TIES = f"{WORKER}ExecStop=/usr/bin/systemctl stop tied.service\n"
FAILED = "[Service]\nExecStart=/bin/false\n"
# It is between two of its processes for some seconds, without a job.
COMES_BACK = f"{WORKER}Restart=always\nExecStopPost=/bin/sleep 3\n"

# A file system whose server answers nothing, not even its first question: each access waits.
HUNG = """\
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
server = os.open("/dev/fuse", os.O_RDWR)
os.makedirs("/run/hung", exist_ok=True)
options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other"
if libc.mount(b"server:/share", b"/run/hung", b"fuse", 0, options.encode()):
    raise OSError(ctypes.get_errno(), "mount")
print("mounted", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def host(lab_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one host to the whole file."""
    console = tmp_path_factory.mktemp("quiesce") / "console.log"
    with start_host(lab_disk, console) as found:
        yield found


def kexec(host: Host, code: int) -> str:
    """Try a handover that ends with this exit code; what khoctl says."""
    return host.khoctl("kexec", *image(VERSION), code=code).stderr


def test_a_reboot_that_is_not_permitted_thaws_and_starts_everything_again(host: Host) -> None:
    drop_in = f"{DROP_INS}/no-reboot.conf"
    host.guest.put(drop_in, NO_REBOOT)
    host.shell("systemctl daemon-reload; systemctl restart kho-handover")
    with producer(host, 'freeze = ["/bin/touch", "/run/frozen"]\n'), unchanged(host):
        said = kexec(host, 1)
        assert "EPERM" in said or "not permitted" in said, said
        host.shell("rm /run/frozen")
        write_to_disk(host)
    host.shell(f"rm {drop_in}; systemctl daemon-reload; systemctl restart kho-handover")


def test_what_is_started_while_the_host_is_stopped(host: Host) -> None:
    """Once: it is stopped too. Again and again: refused, by its name. What was stopped cannot be reached meanwhile."""
    connects = "import socket; socket.socket(socket.AF_UNIX).connect('/run/listener.sock')"
    for path, text in {
        "/usr/lib/own_name.py": OWN_NAME,
        "/usr/share/dbus-1/system-services/org.lab.Poked.service": ACTIVATION,
        "/usr/share/dbus-1/system.d/poked.conf": POLICY,
        "/usr/lib/systemd/system/poked.service": POKED,
        "/usr/lib/systemd/system/late.service": LATE,
        "/usr/lib/systemd/system/starts-late.service": STARTS_LATE,
        "/usr/lib/connects.py": connects,
    }.items():
        host.guest.put(path, text)
    host.shell("systemctl daemon-reload; systemctl reload dbus; systemctl start starts-late")
    looks = "! python3 /usr/lib/connects.py 2>/run/refused && test -e /run/late-was-stopped && touch /run/looked; false"
    with producer(host, f'freeze = ["/bin/sh", "-c", "{looks}"]\n'), unchanged(host):
        kexec(host, 3)
    host.shell("grep -E 'Refused|FileNotFound' /run/refused; rm /run/looked; systemctl kill -s KILL starts-late")
    host.shell("systemctl start poked")
    with producer(host, 'keep = ["dbus.service"]\n'), unchanged(host):
        said = kexec(host, 3)
        assert "poked.service: started again meanwhile" in said, said
    host.shell(
        "rm /usr/share/dbus-1/system-services/org.lab.Poked.service; systemctl reload dbus; systemctl stop poked"
    )


def test_what_is_started_once_the_producers_are_frozen_calls_the_jump_off(host: Host) -> None:
    with producer(host, 'freeze = ["/usr/bin/systemctl", "start", "worker.service"]\n'), unchanged(host):
        said = kexec(host, 3)
        assert "while the host was stopped: worker.service" in said, said
        write_to_disk(host)


def test_a_file_stored_once_the_producers_are_frozen_calls_the_jump_off(host: Host) -> None:
    host.guest.put("/usr/lib/store_late.py", STORE_LATE)
    host.guest.put("/usr/lib/systemd/system/stores-late.service", STORES_LATE)
    host.shell("rm -f /run/frozen; systemctl daemon-reload; systemctl start stores-late")
    is_stored = "systemctl show -p NFileDescriptorStore stores-late | grep -q =1"
    freeze = f'freeze = ["/bin/sh", "-c", "touch /run/frozen; until {is_stored}; do sleep 0.1; done"]\n'
    with producer(host, f'{freeze}keep = ["stores-late.service"]\n'), unchanged(host):
        said = kexec(host, 3)
        assert "Has stored files for the next kernel while the host was stopped: stores-late.service" in said, said
    host.shell("systemctl stop stores-late; systemctl clean --what=fdstore stores-late; rm /run/frozen")


def test_who_blocks_a_shutdown_since_the_checks_is_heard(host: Host) -> None:
    host.shell("systemctl start systemd-logind; rm -f /run/prepares")
    waits = "touch /run/prepares; until ls /run/systemd/inhibit/*.ref; do sleep 0.2; done"
    blocks = "until test -e /run/prepares; do sleep 0.1; done; exec systemd-inhibit --who=upgrade sleep 60"
    lock = host.guest.start(["sh", "-c", blocks])
    with producer(host, f'prepare = ["/bin/sh", "-c", "{waits}"]\nfreeze = ["/bin/touch", "/run/frozen"]\n'):
        with unchanged(host):
            said = kexec(host, 3)
        assert "A shutdown is blocked: upgrade" in said, said
        host.shell("test ! -e /run/frozen; pkill -f '[s]leep 60'")
    lock.wait()


def test_a_service_that_just_restarts_itself_runs_afterwards(host: Host) -> None:
    host.guest.put("/usr/lib/systemd/system/comes-back.service", COMES_BACK)
    host.shell("systemctl daemon-reload; systemctl start comes-back")
    with producer(host), unchanged(host):
        host.shell("systemctl kill -s KILL comes-back")
        kexec(host, 3)
    host.shell("systemctl stop comes-back")


def test_a_kept_unit_that_ends_with_another_one_is_refused_and_runs_afterwards(host: Host) -> None:
    for name, text in {"tied": f"[Unit]\nDefaultDependencies=no\n{WORKER}", "ties": TIES}.items():
        host.guest.put(f"/usr/lib/systemd/system/{name}.service", text)
    host.shell("systemctl daemon-reload; systemctl start tied ties")
    with producer(host, 'freeze = ["/bin/touch", "/run/frozen"]\n'), unchanged(host):
        said = kexec(host, 3)
        assert "Was to stay, and ended when others were stopped: tied.service" in said, said
        host.shell("test ! -e /run/frozen")
    host.shell("systemctl stop ties")


def test_the_session_of_the_operator_lives_on_and_a_failed_unit_stays_failed(host: Host) -> None:
    host.guest.put("/usr/lib/log_in.py", OPERATOR)
    host.guest.put("/usr/lib/systemd/system/operator.service", SESSION.format(words=" ".join(image(VERSION))))
    host.guest.put("/usr/lib/systemd/system/broken.service", FAILED)
    host.shell("systemctl daemon-reload; systemctl start broken; systemctl start systemd-logind", check=False)
    host.shell("timeout 30 sh -c 'until systemctl is-failed -q broken; do sleep 0.1; done'")
    with producer(host), unchanged(host):
        pid = host.shell("rm -f /run/logged-in; systemctl start operator; systemctl show -p MainPID --value operator")
        host.shell("timeout 90 sh -c 'until test -s /run/logged-in; do sleep 0.2; done'")
        said = host.guest.get("/run/logged-in").decode()
        assert said.startswith("3 "), said
        assert "one" in said, said
        assert "session-" in host.guest.get(f"/proc/{pid.strip()}/cgroup").decode()
        assert host.shell("loginctl list-sessions --no-legend | wc -l") == "1\n"
        host.shell("systemctl stop operator")
    assert host.shell("systemctl is-failed broken.service") == "failed\n"
    host.shell("systemctl reset-failed broken.service")


def test_a_read_only_root_and_a_file_system_that_does_not_answer(host: Host) -> None:
    host.guest.put("/run/hung.py", HUNG)
    host.shell("modprobe -q fuse || true; python3 /run/hung.py >/run/hung.log 2>&1 & echo $! > /run/hung.pid")
    host.shell("timeout 30 sh -c 'until grep -q mounted /run/hung.log; do sleep 0.1; done'")
    host.shell(
        "systemctl stop kho-handover.service; cp -a /var/lib/khod /run/khod.kept;"
        "mount -t tmpfs tmpfs /var/lib/khod; cp -a /run/khod.kept/. /var/lib/khod; cp -a /etc/kho /run/kho;"
        "mount --bind /run/kho /etc/kho; mount -o remount,ro /; systemctl start kho-handover.service"
    )
    try:
        with producer(host, 'freeze = ["/sbin/kexec", "-u"]\n'), unchanged(host):
            said = kexec(host, 1)
            assert "EINVAL" in said or "Invalid argument" in said, said
    finally:  # the other tests write to this root
        host.shell(
            "systemctl stop kho-handover.service; mount -o remount,rw /; umount /etc/kho /var/lib/khod;"
            "kill $(cat /run/hung.pid); umount -l /run/hung; systemctl start kho-handover.service"
        )
    write_to_disk(host)


class Point:
    """A moment of the way there or back: the producer's file and the units, one of which kills khod then."""

    def __init__(self, file: str, units: dict[str, str] | None = None) -> None:
        self.file, self.units = file, units or {}


ORDER = "worker.service restarts.service ticker.timer listener.socket"
DIES_ONCE = f"ExecStartPre=/bin/sh -c 'if rm /run/armed; then {KILLS}; fi'\n"
HOOK = ["/bin/sh", "-c", KILLS]
POINTS = {
    "prepared": Point(f"prepare = {HOOK}\n"),
    "first-stop": Point("", {"kills.service": f"[Unit]\nAfter={ORDER}\n{WORKER}ExecStop={KILLS}\n"}),
    "last-stop": Point("", {"kills.service": f"[Unit]\nBefore={ORDER}\n{WORKER}ExecStop={KILLS}\n"}),
    "quiesced": Point(f"freeze = {HOOK}\n"),
    "first-start": Point(REFUSES, {"kills.service": f"[Unit]\nBefore={ORDER}\n{WORKER}{DIES_ONCE}"}),
    "last-start": Point(REFUSES, {"kills.service": f"[Unit]\nAfter={ORDER}\n{WORKER}{DIES_ONCE}"}),
}
IN_MAKE_TEST = ("first-stop", "quiesced", "first-start")


@pytest.mark.parametrize(
    "point", [pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.proof) for name in POINTS]
)
def test_khod_killed_at_a_point_of_the_way_there_or_back(host: Host, point: str) -> None:
    host.shell("rm -f /run/armed")
    for name, text in POINTS[point].units.items():
        host.guest.put(f"/usr/lib/systemd/system/{name}", text)
        host.shell(f"systemctl daemon-reload; systemctl start {name}")
    host.shell("touch /run/armed")
    with producer(host, POINTS[point].file), unchanged(host):
        restarts = host.shell("systemctl show -p NRestarts --value kho-handover")
        host.guest.run(["khoctl", "kexec", *image(VERSION)], check=False)
        host.shell("timeout 60 sh -c 'until khoctl status >/dev/null; do sleep 0.2; done'")
        host.settled()
        assert host.shell("systemctl show -p NRestarts --value kho-handover") != restarts, "it was not killed"
        write_to_disk(host)
    for name in POINTS[point].units:
        host.shell(f"rm /usr/lib/systemd/system/{name}; systemctl daemon-reload; systemctl kill -s KILL {name}")
