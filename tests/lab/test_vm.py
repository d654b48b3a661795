# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual machines through the host's kexec: QEMU runs in the lab's guest, and its own guest counts on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Boot, Online
from tests.lab.counter import LINE, write_image
from tests.lab.host import IMAGES, KHO, MARKER, TRACE, Host, image
from tests.lab.kernels import UPGRADE
from tests.lab.process import call
from tests.lab.recorder import RECORD_BYTES, Record, build_initrd, parse_records, record_content
from tests.lab.vms import OTHER_MACHINE, PASS_ON

VERSION = "7.3.4"
DIRECTORY = "/var/lib/vm"
QEMU = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-display", "none", "-nodefaults"]
COUNT_SECONDS = 60
RESTART_SECONDS = 90
RUNS = [
    pytest.param(VERSION, how, number, marks=[] if (how, number) == ("orderly", 0) else pytest.mark.proof)
    for how in ("orderly", "now")
    for number in range(10)
] + [pytest.param(UPGRADE, "orderly", 0, marks=pytest.mark.proof)]
"""The next kernel, how the host jumps, and a number; the first is in `make test`."""
MANY_MEMORY_MIB = 2048
MIB = 1 << 20
HASH = f"""\
#!/bin/sh
# Add the SHA-256 of the guest's RAM that khod-vm has; it is the process of that number, or else this one's parent.
for file in /proc/${{1:-$PPID}}/fd/*; do
    if [ "$(stat -Lc %s "$file")" = {64 * MIB} ]; then
        sha256sum < "$file" >> {DIRECTORY}/digests
        exit
    fi
done
exit 1
"""
QMP = """\
import json, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("/run/khod-vm/one/qmp")
    lines = connection.makefile("rwb", buffering=0)
    for command in ("qmp_capabilities", sys.argv[1]):
        lines.write(json.dumps({"execute": command}).encode() + b"\\n")
        while "return" not in (answer := json.loads(lines.readline())):
            assert "error" not in answer, answer
print(json.dumps(answer["return"]))
"""
DISK_MIB = 8
LINUX_SECONDS = 300
RECORDS = 20


def start_vms(host: Host, commands: Mapping[str, Sequence[str]], *, qemu: str = QEMU[0], **settings: object) -> None:
    """Start a QEMU for each name, supervised by khod-vm; what its guest writes is in DIRECTORY/NAME."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {"timeout": 120, **settings}.items()]
    for name, words in commands.items():
        serial = ["-chardev", f"file,id=serial,path={DIRECTORY}/{name},append=on", "-serial", "chardev:serial"]
        command = json.dumps([qemu, *QEMU[1:], *words, *serial])
        host.guest.put(f"/etc/kho/vm.d/{name}.toml", f"command = {command}\n{''.join(lines)}")
    host.shell(f"systemctl enable -q --now {' '.join(f'khod-vm@{name}' for name in commands)}; sync")


def with_vms(host: Host, tmp_path: Path, *names: str, mib: int = 64, qemu: str = QEMU[0], **settings: object) -> Host:
    """Start a guest that counts for each name, and wait until it does."""
    host.guest.wait_online()
    host.guest.put(f"{DIRECTORY}/counter", write_image(tmp_path / "counter").read_bytes())
    words = ["-m", f"{mib}M", "-bios", f"{DIRECTORY}/counter"]
    start_vms(host, dict.fromkeys(names, words), qemu=qemu, **settings)
    for name in names:
        counts_on(host, name)
    return host


def read_serial(host: Host, name: str) -> str:
    return host.shell(f"cat {DIRECTORY}/{name} 2>/dev/null", check=False)


def read_numbers(host: Host, name: str) -> list[int]:
    lines = read_serial(host, name).split("\n")[:-1]
    assert all(map(LINE.fullmatch, lines)), lines
    return [int(line, 16) for line in lines]


def wait_until(host: Host, condition: str, seconds: int, unit: str) -> None:
    """Wait until a shell command succeeds; on a failure the messages of the unit are in the report."""
    loop = shlex.quote(f"until {condition}; do sleep 0.2; done")
    told = f"{{ systemctl status {unit}; journalctl -b -u {unit}; exit 1; }}"
    host.guest.run(["sh", "-c", f"timeout {seconds} sh -c {loop} || {told}"], timeout=seconds + 60)


def wait_lines(host: Host, name: str, more: int, seconds: int) -> None:
    """Wait until a guest has written so many lines more."""
    wanted = len(read_serial(host, name).splitlines()) + more
    wait_until(host, f"[ $(wc -l < {DIRECTORY}/{name}) -ge {wanted} ]", seconds, f"khod-vm@{name}")


def counts_on(host: Host, name: str) -> list[int]:
    """Wait until a guest has counted on; its numbers, of which none came twice and none is missing."""
    wait_lines(host, name, 3, COUNT_SECONDS)
    numbers = read_numbers(host, name)
    assert numbers == list(range(1, len(numbers) + 1))
    return numbers


def hash_memory(host: Host, name: str = "one") -> str:
    """Return the digest of a guest's RAM."""
    host.shell(f"{DIRECTORY}/hash $(systemctl show -P MainPID khod-vm@{name})")
    return last_digest(host)


def last_digest(host: Host) -> str:
    return host.shell(f"tail -n 1 {DIRECTORY}/digests").split()[0]


def ask_qemu(host: Host, command: str) -> Any:
    """Carry out a QMP command of the guest `one`."""
    return json.loads(host.guest.run(["python3", "-c", QMP, command]).stdout)


def restart_killed(host: Host, unit: str) -> None:
    """Kill the main process of a unit, and wait until systemd has started it again."""
    before = host.shell(f"systemctl show -P NRestarts {unit}").strip()
    host.shell(f"systemctl kill --kill-whom=main --signal=SIGKILL {unit}")
    again = f"[ $(systemctl show -P NRestarts {unit}) -gt {before} ] && systemctl -q is-active {unit}"
    wait_until(host, again, RESTART_SECONDS, unit)


def verified(host: Host, *names: str) -> dict[str, Any]:
    """Return the verdict: all guests arrived, and all of the pages that khod has compared are as they were."""
    verdict: dict[str, Any] = json.loads(host.khoctl("verify", "--json").stdout)["verdict"]
    assert {*names} <= {*verdict["arrived"]}
    checks = {check["name"]: check for check in verdict["checks"]}
    for name in names:
        assert checks[f"contents {name}"]["result"] == "passed"
        print(checks[f"contents {name}"]["evidence"])
    return verdict


@pytest.mark.parametrize(("following", "how", "number"), RUNS)
def test_a_guest_counts_on_in_the_next_kernel(
    online: Online, tmp_path: Path, following: str, how: str, number: int
) -> None:
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    now = ["--now"] if how == "now" else []
    assert host.guest.kexec(argv=("khoctl", "kexec", *image(following), "--append", MARKER, *now)).how == "kexec"
    verified(host, "one")
    last = counts_on(host, "one")[-1]
    print(f"{following} {how} {number}: counted to {last}")


def test_the_ram_that_arrives_is_the_ram_that_was_frozen(online: Online, tmp_path: Path) -> None:
    """Measured beside khod, over all of it: `up` runs before QEMU is started with what has arrived."""
    host = Host(online(VERSION))
    host.guest.put(f"{DIRECTORY}/hash", HASH, mode=0o755)
    with_vms(host, tmp_path, "one", up=[f"{DIRECTORY}/hash"])
    empty = last_digest(host)
    host.khoctl("activate")
    frozen = hash_memory(host)
    assert frozen != empty

    host.kexec(VERSION)

    counts_on(host, "one")
    assert host.shell(f"wc -l < {DIRECTORY}/digests").strip() == "3"
    assert last_digest(host) == frozen
    verified(host, "one")


@pytest.mark.proof
def test_a_paused_guest_stays_paused_with_its_ram(online: Online, tmp_path: Path) -> None:
    """The digest is that of the RAM after QEMU has loaded its state, and before `cont`."""
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    host.guest.put(f"{DIRECTORY}/hash", HASH, mode=0o755)
    ask_qemu(host, "stop")
    numbers, digest = read_numbers(host, "one"), hash_memory(host)
    for _ in range(2):
        host.kexec(VERSION)
        verified(host, "one")
        assert ask_qemu(host, "query-status")["status"] == "paused"
        assert read_numbers(host, "one") == numbers
        assert hash_memory(host) == digest
    ask_qemu(host, "cont")
    counts_on(host, "one")


@pytest.mark.proof
def test_a_khod_vm_that_is_killed_after_the_jump_takes_its_guest_over(online: Online, tmp_path: Path) -> None:
    """Then the guest goes through another jump: the RAM that it was started with is still what is handed over."""
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    host.kexec(VERSION)
    verified(host, "one")
    qemu = host.shell("pgrep -x qemu-system-x86")

    restart_killed(host, "khod-vm@one")

    assert host.shell("pgrep -x qemu-system-x86") == qemu
    counts_on(host, "one")
    host.kexec(VERSION)
    verified(host, "one")
    counts_on(host, "one")


def test_a_frozen_guest_counts_on_when_the_handover_ends_early(online: Online, tmp_path: Path) -> None:
    """First by an abort, then because khod is killed, which rolls back when it is started again."""
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    host.khoctl("activate")
    assert ask_qemu(host, "query-status")["status"] == "postmigrate"
    host.khoctl("abort")
    counts_on(host, "one")

    host.khoctl("activate")
    assert ask_qemu(host, "query-status")["status"] == "postmigrate"
    restart_killed(host, "kho-handover")
    assert host.settled()["phase"] == "idle"
    counts_on(host, "one")


@pytest.mark.proof
def test_eight_guests_count_on(boot: Boot, tmp_path: Path) -> None:
    names = [f"vm{number}" for number in range(8)]
    host = Host(boot(VERSION, cmdline_extra=f"{KHO} {TRACE}", memory_mib=MANY_MEMORY_MIB))
    with_vms(host, tmp_path, *names, mib=16)
    host.kexec(VERSION)
    verified(host, *names)
    for name in names:
        counts_on(host, name)


@pytest.mark.proof
@pytest.mark.parametrize("who", ["QEMU", "both"])
def test_a_guest_counts_on_whoever_is_killed_while_it_is_frozen(online: Online, tmp_path: Path, who: str) -> None:
    """systemd starts khod-vm again; where both are killed, khod has rolled back before it is there."""
    host = with_vms(Host(online(VERSION)), tmp_path, "one")
    host.khoctl("activate")
    host.shell("pkill -KILL -x qemu-system-x86")
    if who == "both":
        restart_killed(host, "khod-vm@one")
    else:
        host.khoctl("abort")
    counts_on(host, "one")
    host.kexec(VERSION)
    verified(host, "one")
    counts_on(host, "one")


@pytest.mark.proof
def test_a_guest_that_the_next_qemu_refuses_waits_for_a_repair(online: Online, tmp_path: Path) -> None:
    """The QEMU of the next kernel makes another machine; then the machine's file names one that does not."""
    host = Host(online(VERSION))
    host.guest.wait_online()
    qemu = f"{DIRECTORY}/qemu"
    host.guest.put(qemu, PASS_ON, mode=0o755)
    with_vms(host, tmp_path, "one", qemu=qemu)
    host.guest.put(qemu, OTHER_MACHINE, mode=0o755)
    host.shell("sync")
    last = read_numbers(host, "one")[-1]

    host.kexec(VERSION)

    assert host.settled(code=7)["outcome"] == "degraded"
    log = host.shell("journalctl -b -o cat -u khod-vm@one")
    assert "Machine type" in log
    assert "the command in its file, then: khoctl producers retry one" in log
    numbers = read_numbers(host, "one")
    assert numbers[-1] >= last
    host.shell(f"sed -i s,{qemu},{QEMU[0]}, /etc/kho/vm.d/one.toml")
    host.khoctl("producers", "retry", "one")
    assert counts_on(host, "one")[len(numbers)] == numbers[-1] + 1


def read_records(host: Host) -> list[Record]:
    """Return what the Linux guest has reported: no record is missing, and its uptime never went back."""
    records = parse_records(read_serial(host, "linux"))
    assert [record.number for record in records] == list(range(len(records)))
    uptimes = [record.uptime for record in records]
    assert uptimes == sorted(uptimes)
    return records


@pytest.mark.proof
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_what_a_linux_guest_has_written_is_on_its_disk(online: Online, tmp_path: Path, form: str) -> None:
    """At the end QEMU is killed: what is on the disk then is what the guest was told is there."""
    host = Host(online(VERSION))
    host.guest.wait_online()
    disk, plain = tmp_path / "disk", tmp_path / "plain"
    call(["qemu-img", "create", "-q", "-f", form, disk, f"{DISK_MIB}M"])
    host.guest.put(f"{DIRECTORY}/disk", disk.read_bytes())
    host.guest.put(f"{DIRECTORY}/initrd", build_initrd(tmp_path))
    kernel = ["-kernel", f"{IMAGES}/{VERSION}/bzImage", "-initrd", f"{DIRECTORY}/initrd"]
    kernel += ["-append", "console=ttyS0 loglevel=1 panic=-1"]
    drive = ["-drive", f"file={DIRECTORY}/disk,if=virtio,format={form}"]
    start_vms(host, {"linux": ["-m", "128M", "-no-reboot", *kernel, *drive]})
    wait_lines(host, "linux", RECORDS, LINUX_SECONDS)
    before = read_records(host)[-1]

    host.kexec(VERSION)

    verified(host, "linux")
    wait_lines(host, "linux", RECORDS, LINUX_SECONDS)
    host.shell("systemctl disable -q khod-vm@linux; pkill -KILL -x qemu-system-x86")
    records = read_records(host)
    assert records[-1].number > before.number
    print(f"{form}: {len(records)} records; record {before.number} at an uptime of {before.uptime:.2f} s,", end=" ")
    print(f"{records[-1].number} at {records[-1].uptime:.2f} s")
    disk.write_bytes(host.guest.get(f"{DIRECTORY}/disk"))
    call(["qemu-img", "convert", "-f", form, "-O", "raw", disk, plain])
    content = plain.read_bytes()
    lost = [
        record.number
        for record in records
        if content[record.number * RECORD_BYTES : (record.number + 1) * RECORD_BYTES] != record_content(record.number)
    ]
    assert lost == []
