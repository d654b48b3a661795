# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-vm without a QEMU: the file of a virtual machine, QEMU's command line, the guest agent, and the slots."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from khod.errors import ConfigError, UsageError
from khod.producers.children import Children
from khod.producers.directory import load_directory
from khod.vm import agent
from khod.vm.agent import GuestClock, set_guest_clock
from khod.vm.arguments import check_command, complete_command, pin_machine
from khod.vm.monitor import VmError
from khod.vm.settings import load_settings
from khod.vm.sharing import check_unshared
from khod.vm.slots import count_slots, hold_slot

QEMU = "qemu-system-x86_64"
HELP = """\
Supported machines are:
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
"""


# QEMU's command line


@pytest.mark.parametrize(
    ("size", "expected"),
    [("64M", 64 << 20), ("64", 64 << 20), ("size=2G", 2 << 30), ("1g,foo=bar", 1 << 30), ("4096k", 4 << 20)],
)
def test_the_guest_s_memory_is_what_m_says(size: str, expected: int) -> None:
    assert check_command([QEMU, "-M", "q35", "-m", size]) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["-daemonize"],
        ["--daemonize"],
        ["-incoming", "defer"],
        ["-snapshot"],
        ["-loadvm", "before"],
        ["-readconfig", "vm.cfg"],
        ["-mem-path", "/dev/hugepages"],
        ["-mem-prealloc"],
        ["-numa", "node,memdev=ram"],
        ["-object", "memory-backend-memfd,id=ram,size=1G,hugetlb=on"],
        ["-object", "memory-backend-file,id=a,size=1G,mem-path=/a", "-object", "memory-backend-ram,id=b,size=1G"],
        ["-machine", "q35,memory-backend=ram"],
        ["-M", "memory-backend=ram"],
        ["-m", "1G,slots=2,maxmem=2G"],
        ["-device", "vfio-pci,host=0000:01:00.0"],
        ["-device", "vhost-user-fs-pci,chardev=c"],
        ["-netdev", "tap,id=n,fd=7"],
        ["-netdev", "tap,id=n,fds=7:8,vhost=on"],
        ["-chardev", "socket,id=c,fd=9"],
        ["-serial", "fd:7"],
        ["-drive", "file=/dev/fd/7"],
        ["-drive", "file=fd:7"],
        ["-drive", "file=a.qcow2,snapshot=on"],
        ["-add-fd", "fd=3,set=1"],
    ],
)
def test_what_cannot_go_through_a_kexec_is_refused_by_name(words: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot go through a kexec: ") as raised:
        check_command([QEMU, "-m", "1G", *words])
    assert words[0].lstrip("-") in str(raised.value)


@pytest.mark.parametrize("words", [[], ["-m", "0"], ["-m", "much"], ["-m"], ["-m", "-1"]])
def test_a_guest_without_a_size_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="-m"):
        check_command([QEMU, *words])


def test_what_looks_like_a_refused_option_is_taken() -> None:
    words = ["-name", "incoming", "-drive", "file=/vm/snapshot.qcow2", "-append", "fd=7", "-chardev", "null,id=fd"]
    assert check_command([QEMU, "-m", "1G", *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-M", "q35"], ["-M", "pc-q35-7.2"]),
        (["-machine", "q35,accel=kvm"], ["-machine", "pc-q35-7.2,accel=kvm"]),
        (["-machine", "type=pc,accel=kvm"], ["-machine", "type=pc-i440fx-7.2,accel=kvm"]),
        (["-M", "pc-q35-7.2"], ["-M", "pc-q35-7.2"]),
        (["-machine", "accel=kvm"], ["-machine", "accel=kvm", "-machine", "pc-i440fx-7.2"]),
        ([], ["-machine", "pc-i440fx-7.2"]),
    ],
)
def test_the_machine_type_is_a_versioned_one(words: list[str], expected: list[str]) -> None:
    assert pin_machine([QEMU, *words], HELP) == [QEMU, *expected]


def test_a_qemu_without_a_default_machine_needs_its_name() -> None:
    with pytest.raises(UsageError, match="no default machine"):
        pin_machine(["qemu-system-aarch64"], "virt  QEMU 7.2 ARM Virtual Machine (alias of virt-7.2)\n")


def test_the_memory_is_a_descriptor_and_the_guest_waits_for_its_state() -> None:
    argv = complete_command([QEMU, "-m", "1M"], 7, 1 << 20, 8, incoming=True)
    assert argv[:3] == [QEMU, "-m", "1M"]
    assert "memory-backend-file,id=khod-ram,size=1048576,mem-path=/proc/self/fd/7,share=on" in argv
    assert "socket,id=khod-qmp,fd=8,server=on,wait=off" in argv
    assert argv[-2:] == ["-incoming", "defer"]
    assert "-incoming" not in complete_command([QEMU], 7, 1, 8, incoming=False)


# Its file


def write_file(root: Path, text: str) -> Path:
    path = root / "etc/kho/vm.d/one.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_with_a_command_is_enough(tmp_path: Path) -> None:
    write_file(tmp_path, f'command = ["{QEMU}", "-m", "1G"]\n')
    found = load_settings("one", tmp_path)
    assert (found.name, found.size, found.after) == ("one", 1 << 30, ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`command` is missing"),
        ("command = []", "`command` is missing"),
        ('command = "qemu -m 1G"', "`command` is"),
        ('command = ["qemu", "-m", "1G"]\nmemory = 1', "one.toml:2"),
        ('timeout = 1\ncommand = ["qemu", "-daemonize"]', "one.toml:2"),
        ('command = ["qemu", "-m", "1G"]\ntimeout = 0', "one.toml:2"),
        ('command = ["qemu", "-m", "1G"]\nup = "ip"', "`up` is"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    write_file(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_settings("one", tmp_path)
    assert words in str(raised.value)


# The file of one that others start

KEPT = 'qmp = "/run/q"\nkeep = true\n'


def write_kept(root: Path, text: str) -> Path:
    path = root / "etc/kho/producers.d/one.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("restart", "expected"), [('"one.service"', ("one.service",)), ('["/sbin/one", "-x"]', ("/sbin/one", "-x"))]
)
def test_what_starts_it_again_is_a_unit_or_a_command(tmp_path: Path, restart: str, expected: tuple[str, ...]) -> None:
    write_kept(tmp_path, f"{KEPT}restart = {restart}\n")
    found = load_settings("one", tmp_path)
    assert (found.qmp, found.restart) == ("/run/q", expected)
    (stand_in,) = load_directory(tmp_path, Children())
    assert (stand_in.name, stand_in.kind) == ("one", "vm")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (KEPT, "`restart` is missing"),
        (f"{KEPT}restart = []", "`restart` is missing"),
        (f'{KEPT}restart = "/sbin/one"', "`restart` is '/sbin/one'"),
        (f"{KEPT}restart = 1", "`restart` is 1"),
        ('qmp = "q"\nkeep = true\nrestart = "one.service"', "`qmp` is 'q'"),
        (f'{KEPT}restart = "one.service"\nfreeze = ["true"]', "stands beside"),
        (f'{KEPT}restart = "one.service"\nsize = 1', "one.toml:4"),
    ],
)
def test_what_is_wrong_with_the_file_of_a_kept_one_is_named(tmp_path: Path, text: str, words: str) -> None:
    write_kept(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_directory(tmp_path, Children())
    assert words in str(raised.value)


def test_one_machine_has_one_file(tmp_path: Path) -> None:
    write_kept(tmp_path, f'{KEPT}restart = "one.service"')
    write_file(tmp_path, f'command = ["{QEMU}", "-m", "1G"]')
    with pytest.raises(ConfigError, match="Two files"):
        load_settings("one", tmp_path)


# What two machines may not have in common


def write_machines(root: Path, *words: str) -> list[Path]:
    """Write a file for each machine: `qmp=PATH` for one that others start, else a word of QEMU's command line."""
    paths = []
    for name, word in zip(("one", "two"), words, strict=True):
        is_kept = word.startswith("qmp=")
        path = root / ("etc/kho/producers.d" if is_kept else "etc/kho/vm.d") / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        command = json.dumps([QEMU, "-m", "1G", *word.split(" ")])
        path.write_text(
            f'qmp = "{word[4:]}"\nkeep = true\nrestart = "x.service"' if is_kept else f"command = {command}"
        )
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    "words",
    [
        ("-drive file=/vm/disk,if=virtio", "-hda /vm/disk"),
        ("-drive file=/vm/disk", "-drive file=/vm/../vm/disk,readonly=off"),
        ("-blockdev driver=raw,node-name=a,file.driver=file,file.filename=/vm/disk", "-drive file=/vm/disk"),
        ('-blockdev {"driver":"file","node-name":"a","filename":"/vm/disk"}', "-drive file=/vm/disk"),
        ("-qmp unix:/run/q,server=on,wait=off", "-monitor unix:/run/q,server,nowait"),
        ("-chardev socket,id=a,path=/run/q,server=on", "qmp=/run/q"),
        ("-vnc unix:/run/q", "qmp=/run/q"),
        ("-display none", "qmp=/run/khod-vm/one/qmp"),
        ("qmp=/run/q", "qmp=/run/q"),
    ],
)
def test_a_disk_or_socket_of_two_machines_is_refused_by_both_files(tmp_path: Path, words: tuple[str, str]) -> None:
    paths = write_machines(tmp_path, *words)
    for name in ("one", "two"):
        with pytest.raises(ConfigError, match=r"Two virtual machines have the (disk|socket) /") as raised:
            check_unshared(name, tmp_path)
        assert all(str(path) in str(raised.value) for path in paths)


@pytest.mark.parametrize(
    "words",
    [
        ("-drive file=/vm/disk,readonly=on", "-drive file=/vm/disk"),
        ("-drive file=/vm/disk -device virtio-blk,share-rw=on", "-drive file=/vm/disk"),
        ("-drive file=/vm/disk,media=cdrom", "-drive file=/vm/disk,media=cdrom"),
        ('-blockdev {"driver":"file","read-only": true,"filename":"/vm/disk"}', "-drive file=/vm/disk"),
        ("-drive file=/vm/disk", "-drive file=/vm/disk2"),
        ("-serial file:/vm/disk", "-drive file=/vm/disk"),
        ("-chardev socket,id=a,path=/run/q", "-chardev socket,id=a,path=/run/q,server=off"),
        ("-qmp unix:/run/q,server=on", "qmp=/run/q2"),
    ],
)
def test_what_two_machines_only_read_or_connect_to_is_not_refused(tmp_path: Path, words: tuple[str, str]) -> None:
    write_machines(tmp_path, *words)
    check_unshared("one", tmp_path)
    check_unshared("two", tmp_path)


def test_a_disk_that_qemu_has_is_compared_and_a_wrong_file_is_not(tmp_path: Path) -> None:
    (first, second) = write_machines(tmp_path, "qmp=/run/q", "-drive file=/vm/disk")
    with pytest.raises(ConfigError, match=f"{first} and {second}"):
        check_unshared("one", tmp_path, [Path("/vm/disk")])
    second.write_text("command = [")
    check_unshared("one", tmp_path, [Path("/vm/disk")])


@pytest.mark.parametrize("keep", ["", "keep = true\nrestart = 'one.service'"])
def test_two_producers_with_one_qmp_socket_are_refused_by_both_files(tmp_path: Path, keep: str) -> None:
    (first, second) = write_machines(tmp_path, "qmp=/run/q", "qmp=/run/q")
    second.write_text(f"qmp = '/run/q'\n{keep}")
    with pytest.raises(ConfigError, match="/run/q") as raised:
        load_directory(tmp_path, Children())
    assert all(str(path) in str(raised.value) for path in (first, second))
    assert [each.name for each in raised.value.readable] == ["one"]


# The guest agent

Answer = Callable[[dict[str, object]], list[object]]


@asynccontextmanager
async def serve_agent(directory: Path, answer: Answer) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve an agent that answers so; its socket, and the names of the calls it had."""
    calls: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            call = json.loads(line)
            calls.append(call["execute"])
            for each in answer(call):
                writer.write(json.dumps(each).encode() + b"\n")
            await writer.drain()
        writer.close()

    path = str(directory / "agent")
    async with await asyncio.start_unix_server(serve, path):
        yield path, calls


async def ask_agent(directory: Path, answer: Answer) -> list[str]:
    """Ask an agent that answers so to set the clock; the names of the calls it had."""
    async with serve_agent(directory, answer) as (path, calls):
        await set_guest_clock(path)
    return calls


def answer_well(call: dict[str, object]) -> list[object]:
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        return [{"return": "an answer to somebody else"}, {"return": arguments["id"]}]
    return [{"return": {}}]


async def test_the_agent_sets_the_clock(tmp_path: Path) -> None:
    assert await ask_agent(tmp_path, answer_well) == ["guest-sync", "guest-set-time"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            lambda call: answer_well(call) if "arguments" in call else [{"error": {"desc": "no\x1b[2J"}}],
            "refuses `guest-set-time`",
        ),
        (lambda _call: [], "did not answer"),
    ],
)
async def test_an_agent_that_does_not_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    if words == "did not answer":
        monkeypatch.setattr(agent, "DEADLINE_SECONDS", 0.1)
    with pytest.raises(VmError, match=words) as raised:
        await ask_agent(tmp_path, answer)
    assert str(raised.value).isprintable()


async def test_a_guest_was_stopped_for_what_its_clock_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is 5 s behind, and after it 8.5 s: then it is set."""
    monkeypatch.setattr("time.time", lambda: 1000.0)
    behind = [5.0, 8.5]

    def answer(call: dict[str, object]) -> list[object]:
        if call["execute"] == "guest-get-time":
            return [{"return": int((1000.0 - behind.pop(0)) * 1e9)}]
        return answer_well(call)

    async with serve_agent(tmp_path, answer) as (path, calls):
        clock = GuestClock(path)
        lag = await clock.read_lag()
        assert lag == 5.0
        clock.note_continued(lag)
        assert await clock.wait_stopped() == 3.5
        while "guest-set-time" not in calls:  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0)


async def test_a_guest_whose_clock_cannot_be_read_was_stopped_for_an_unknown_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "FINISH_SECONDS", 0.01)
    assert await GuestClock("").read_lag() is None
    assert await GuestClock("").wait_stopped() is None
    async with serve_agent(tmp_path, lambda _call: []) as (path, _):
        clock = GuestClock(path)
        clock.note_continued(5.0)
        assert await clock.wait_stopped() is None, "its agent does not answer in time"
    clock = GuestClock(str(tmp_path / "nowhere"))
    clock.note_continued(5.0)
    assert await clock.wait_stopped() is None


async def test_no_agent_is_named(tmp_path: Path) -> None:
    asking: Awaitable[None] = set_guest_clock(str(tmp_path / "nowhere"))
    with pytest.raises(VmError, match="ENOENT"):
        await asking


# The slots


async def test_a_machine_waits_until_another_one_has_started(tmp_path: Path) -> None:
    waits, holds = asyncio.Event(), asyncio.Event()

    async def start_one_more() -> None:
        async with hold_slot(tmp_path, lambda _reason, _progress: waits.set()):
            holds.set()

    async with AsyncExitStack() as started:
        for _ in range(count_slots() - 1):
            await started.enter_async_context(hold_slot(tmp_path, refuse_to_wait))
        async with hold_slot(tmp_path, refuse_to_wait):
            waiting = asyncio.ensure_future(start_one_more())
            await waits.wait()
            assert not holds.is_set()
        await waiting
        assert holds.is_set()


HOLDER = """
import asyncio, sys
from pathlib import Path
from khod.vm.slots import hold_slot
async def run():
    async with hold_slot(Path(sys.argv[1]), print):
        print("held", flush=True)
        await asyncio.Event().wait()
asyncio.run(run())
"""


def start_holder(directory: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds a slot when this returns."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


async def test_the_slot_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    holders = [start_holder(tmp_path) for _ in range(count_slots())]
    try:
        with pytest.raises(AssertionError, match="waiting for a slot"):
            async with hold_slot(tmp_path, refuse_to_wait):
                pass
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    async with hold_slot(tmp_path, refuse_to_wait):
        pass


async def test_a_directory_without_slots_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VmError, match="file/slots cannot be used for its locks"):
        async with hold_slot(tmp_path / "file/slots", refuse_to_wait):
            pass


def refuse_to_wait(reason: str, _progress: float | None) -> None:
    raise AssertionError(reason)
