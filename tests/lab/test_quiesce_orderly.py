# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the disk has at the jump, read outside of the guest: as much as after `systemctl kexec`, and clean."""

import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.lab.conftest import Online
from tests.lab.guest import Guest
from tests.lab.host import IMAGES, INITRD, Host, image
from tests.lab.process import call
from tests.lab.quiescing import VERSION, install
from tests.lab.witness import JUMP

OUR_LAST = "khod: executing: the jump is asked for"
OUR_SYNC = "systemd-journald: Received client request to sync journal (with offlining)."
SEED = "/var/lib/systemd/random-seed"
REBOOTS = "/var/lib/reboots"
PERSISTENT = "[Journal]\nStorage=persistent\nRateLimitBurst=0\n"
# Where wtmpdb is installed, this unit of its package writes the end of the boot when it is stopped.
WTMPDB = f"""\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo up >> {REBOOTS}'
ExecStop=/bin/sh -c 'echo down >> {REBOOTS}'
[Install]
WantedBy=multi-user.target
"""
UNITS = {"wtmpdb-update-boot.service": WTMPDB}
SETUP = """\
rm -f /etc/systemd/journald.conf.d/lab.conf
mkdir -p /var/log/journal
systemctl unmask -q systemd-random-seed.service systemd-journal-flush.service
systemctl daemon-reload
systemctl restart systemd-journald
systemctl start systemd-journal-flush systemd-random-seed wtmpdb-update-boot
systemctl enable -q wtmpdb-update-boot
touch -d @0 /var/lib/systemd/random-seed
sync
"""
# A service that stores what it has when it is stopped, and looks at its start for what is there.
STORE = """\
import hashlib, os, select, signal, sys
from systemd import daemon

def store(*_):
    for name, words in CONTENTS.items():
        memfd = os.memfd_create(name)
        os.write(memfd, words)
        daemon.notify(f"FDSTORE=1\\nFDNAME={name}", fds=[memfd])
    ours, theirs = os.pipe()
    daemon.notify("BARRIER=1", fds=[theirs])
    os.close(theirs)
    select.select([ours], [], [])
    sys.exit()

CONTENTS = {name: name.encode() * 300_000 for name in ("first", "second")}
signal.signal(signal.SIGTERM, store)
with open("/run/arrived", "w") as file:
    for fd, name in sorted(daemon.listen_fds_with_names().items()):
        print(name, hashlib.sha256(os.pread(fd, 1 << 24, 0)).hexdigest(), file=file)
daemon.notify("READY=1")
while True:
    signal.pause()
"""
STORES = """\
[Service]
Type=notify
ExecStart=/usr/bin/python3 /usr/lib/store.py
FileDescriptorStoreMax=4
FileDescriptorStorePreserve=yes
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Left:
    """The disk at the moment of a jump."""

    disk: Path

    def ask(self, program: str, *words: str) -> str:
        """Ask dumpe2fs or debugfs about the disk."""
        return subprocess.run([program, *words, self.disk], capture_output=True, text=True, check=True).stdout

    def read(self, path: str) -> str:
        """Return the text of a file."""
        return self.ask("debugfs", "-R", f"cat {path}")

    def modified(self, path: str) -> int:
        """Return a file's time of modification, in whole seconds since 1970."""
        found = re.search(r"mtime: 0x([0-9a-f]{8})", self.ask("debugfs", "-R", f"stat {path}"))
        assert found, path
        return int(found[1], 16)


def jump(host: Host, *argv: str, disk: Path) -> Left:
    """Run a command that jumps, stop the guest where its kernel says so, and go on once the disk was read."""
    guest, since, previous = host.guest, len(host.guest.console()), host.guest.boot_id
    guest.start(argv)
    guest.wait_console(JUMP, 120, since=since)
    guest.qmp("stop")
    copy_disk(guest, disk)
    guest.qmp("cont")
    assert guest.wait_reboot(previous).how == "kexec"
    return Left(disk)


def copy_disk(guest: Guest, to: Path) -> None:
    """Copy what the stopped guest's disk is now."""
    socket = to.with_suffix(".nbd")
    (node,) = [block["inserted"]["node-name"] for block in guest.qmp("query-block") if "inserted" in block]
    guest.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    guest.qmp("block-export-add", type="nbd", id="copy", node_name=node, name="disk")
    call(["qemu-img", "convert", "-O", "raw", f"nbd+unix:///disk?socket={socket}", to])
    guest.qmp("nbd-server-stop")


def read_last_entries(host: Host) -> list[str]:
    """Return what was logged last in the boot before: each entry's sender and text."""
    entries = [json.loads(line) for line in host.shell("journalctl -b -1 -n 50 -o json").splitlines()]
    return [f"{entry.get('SYSLOG_IDENTIFIER', '')}: {entry['MESSAGE']}" for entry in entries]


def now(host: Host) -> float:
    return float(host.shell("date +%s.%N"))


def test_the_disk_has_what_it_has_after_systemctl_kexec(online: Online, tmp_path: Path) -> None:
    host = Host(online(VERSION))
    install(host)
    for name, text in UNITS.items():
        host.guest.put(f"/usr/lib/systemd/system/{name}", text)
    host.shell(SETUP)
    asked = now(host)
    ours = jump(host, "khoctl", "kexec", *image(VERSION), disk=tmp_path / "ours")
    assert host.settled()["phase"] == "verified"
    our_last = read_last_entries(host)
    words = f"-s -l {IMAGES}/{VERSION}/bzImage --initrd={INITRD} --reuse-cmdline"
    host.shell(f"kexec {words}; sync")
    theirs = jump(host, "systemctl", "kexec", disk=tmp_path / "theirs")
    their_last = read_last_entries(host)
    # Each journal ends with journald's own last act; khod's comes after all that khod has logged, and the bench
    # compares the time from there to the jump. What the kernel logs meanwhile may follow.
    assert their_last[-1] == "systemd-journald: Journal stopped"
    # journald may note khod's call before it reads khod's last record; it answers once it has written both.
    ended = max(our_last.index(OUR_LAST), our_last.index(OUR_SYNC)) + 1
    assert {entry.partition(":")[0] for entry in our_last[ended:]} <= {"systemd-journald", "kernel"}, our_last
    for left in (ours, theirs):
        features = left.ask("dumpe2fs", "-h").partition("Filesystem features:")[2].partition("\n")[0].split()
        assert "has_journal" in features
        assert "needs_recovery" not in features
    assert ours.modified(SEED) >= int(asked)
    assert ours.read(REBOOTS).split()[-2:] == ["up", "down"]
    assert theirs.read(REBOOTS).split()[-2:] == ["up", "down"]


def test_the_files_that_a_service_stores_in_its_stop_arrive(online: Online) -> None:
    """systemd alone hands them over: khod leaves the jump to it."""
    host = Host(online(VERSION))
    host.guest.put("/usr/lib/store.py", STORE)
    host.guest.put("/usr/lib/systemd/system/store.service", STORES)
    host.shell("systemctl daemon-reload; systemctl enable -q --now store; sync; test ! -s /run/arrived")
    host.kexec(VERSION)
    assert host.settled()["phase"] == "verified"
    host.shell("timeout 60 sh -c 'until systemctl -q is-active store; do sleep 0.2; done'")
    arrived = dict(line.split() for line in host.guest.get("/run/arrived").decode().splitlines())
    contents = {name: name.encode() * 300_000 for name in ("first", "second")}
    assert arrived == {name: hashlib.sha256(words).hexdigest() for name, words in contents.items()}
