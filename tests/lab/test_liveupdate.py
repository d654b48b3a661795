# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod rests on when it preserves files by LUO, seen on a real kernel and systemd by the abi module alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import REPOSITORY, Online
from tests.lab.guest import Guest
from tests.lab.host import IMAGES, INITRD

VERSION = "7.3.4"
HOME = "/lab/luo"
MODULES = (
    *("khod/__init__.py", "khod/dataclass.py", "khod/abi/__init__.py", "khod/abi/named.py", "khod/abi/liveupdate.py"),
)

SCRIPT = r'''
"""ask.py MODE: carry a mode out and print what came of each call, as JSON."""
import contextlib, errno, fcntl, hashlib, json, mmap, os, select, signal, socket, sys
from pathlib import Path
from khod.abi import liveupdate as luo
from systemd import daemon

MIB = 1 << 20
F_ADD_SEALS, F_GET_SEALS, F_SEAL_WRITE, EVERY_SEAL = 1033, 1034, 8, 15
NOEXEC_SEAL, HUGETLB = 8, 4


def word(call, *arguments):
    """`ok`, or the name of the call's errno."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


@contextlib.contextmanager
def device():
    fd = luo.open_device(Path("/dev/liveupdate"))
    try:
        yield fd
    finally:
        os.close(fd)


def create(name):
    with device() as fd:
        return luo.create_session(fd, name)


def retrieve(name):
    with device() as fd:
        return luo.retrieve_session(fd, name)


def memory(size, data=b"", flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create("lab", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if data:  # huge pages take no write(2), not even of nothing
        os.pwrite(fd, data, 0)
    return fd


def huge():
    Path("/proc/sys/vm/nr_hugepages").write_text("1")
    return memory(2 * MIB, flags=HUGETLB)


def sha256(fd):
    digest = hashlib.sha256()
    for at in range(0, os.fstat(fd).st_size, MIB):
        digest.update(os.pread(fd, MIB, at))
    return digest.hexdigest()


def tell(*states, fds=None):
    """Tell the service manager, and wait until it has read that."""
    daemon.notify("\n".join(states), fds=fds or [])
    reader, writer = os.pipe()
    daemon.notify("BARRIER=1", fds=[writer])
    os.close(writer)
    poll = select.poll()
    poll.register(reader, 0)
    assert poll.poll(20_000) == [(reader, select.POLLHUP)]
    os.close(reader)


def kinds():
    """Which files a session takes."""
    session, other = create("kinds"), create("other")
    taken, sealed = memory(4096, b"x"), memory(4096, b"x")
    fcntl.fcntl(sealed, F_ADD_SEALS, EVERY_SEAL)
    sparse = memory(MIB)
    near, far = socket.socketpair()
    preserve = lambda fd, token: word(luo.preserve_fd, session, fd, token)
    with device() as fd:
        found = {"the device while it is open": word(luo.open_device, Path("/dev/liveupdate"))}
        for name in ("n" * 63, "", "kinds"):
            found[f"a session named {name!r}"] = word(luo.create_session, fd, name)
        found["a session that did not come"] = word(luo.retrieve_session, fd, "nonesuch")
    return found | {
        "memfd": preserve(taken, 0),
        "sealed memfd": preserve(sealed, 1),
        "empty memfd": preserve(memory(0), 2),
        "sparse memfd": preserve(sparse, 3),
        "its blocks": os.fstat(sparse).st_blocks * 512 // MIB,
        "huge pages": preserve(huge(), 4),
        "pipe": preserve(os.pipe()[0], 5),
        "socket": preserve(near.fileno(), 6),
        "file on a disk": preserve(os.open(__file__, os.O_RDONLY), 7),
        "/dev/null": preserve(os.open("/dev/null", os.O_RDWR), 8),
        "session": preserve(other, 9),
        "closed": preserve(-1, 10),
        "twice": preserve(taken, 11),
        "twice, in another session": word(luo.preserve_fd, other, taken, 0),
        "a token in use": preserve(memory(4096), 0),
        "the largest token": preserve(memory(4096), 2**64 - 1),
        "a file out of an outgoing session": word(luo.retrieve_fd, session, 0),
        "finish of an outgoing session": word(luo.finish_session, session),
        "name": luo.get_name(session),
        "name of no session": word(luo.get_name, taken),
    }


def changes():
    """What may be done with a memfd while it is preserved, and after."""
    fd, session = memory(2 * MIB, b"x"), create("changes")
    view = mmap.mmap(fd, MIB)
    luo.preserve_fd(session, fd, 1)
    found = {
        "write": word(os.pwrite, fd, b"y", 0),
        "store": word(view.__setitem__, 1, 1),
        "write past the end": word(os.pwrite, fd, b"y", 2 * MIB),
        "grow": word(os.ftruncate, fd, 3 * MIB),
        "shrink": word(os.ftruncate, fd, MIB),
    }
    view.close()
    found["seal against writing"] = word(fcntl.fcntl, fd, F_ADD_SEALS, F_SEAL_WRITE)
    copy = os.dup(session)
    os.close(session)
    found["grow, one copy of the session closed"] = word(os.ftruncate, fd, 3 * MIB)
    os.close(copy)
    found["grow, both closed"] = word(os.ftruncate, fd, 3 * MIB)
    found["preserve again"] = word(luo.preserve_fd, create("changes"), fd, 1)
    return found


def fill(session):
    """Preserve 16 MiB and change them afterwards; their hash then."""
    fd = memory(16 * MIB, os.urandom(16 * MIB))
    os.lseek(fd, 12345, 0)
    luo.preserve_fd(session, fd, 1)
    os.pwrite(fd, b"written after preserve", 4096)
    with mmap.mmap(fd, 16 * MIB) as view:
        view[8 * MIB : 8 * MIB + 6] = b"stored"
    noexec, sealed = memory(4096, b"x", NOEXEC_SEAL), memory(4096, b"x")
    fcntl.fcntl(sealed, F_ADD_SEALS, EVERY_SEAL)
    luo.preserve_fd(session, sealed, 2)
    luo.preserve_fd(session, noexec, 3)
    luo.preserve_fd(session, memory(8 * MIB), 4)
    return sha256(fd)


def keep():
    """A service with descriptors in its store: what it is passed, or what it makes."""
    passed = {name: fd for fd, name in daemon.listen_fds_with_names().items()}
    found = {"passed": sorted(passed)}
    if passed:
        session = passed["session"]
        fd = luo.retrieve_fd(session, 1)
        found |= {"sha256": sha256(fd), "name": luo.get_name(session), "others take it": word(retrieve, "kept")}
        found["store"] = os.pread(passed["plain"], 5, 0).decode()
        luo.finish_session(session)
        os.close(session)
        tell("FDSTOREREMOVE=1", "FDNAME=session")
        found["after it was let go"] = word(retrieve, "kept")
    else:
        session = create("kept")
        found["sha256"] = fill(session)
        tell("FDSTORE=1", "FDNAME=session", fds=[session])
        tell("FDSTORE=1", "FDNAME=plain", fds=[memory(4096, b"plain")])
        tell("FDSTORE=1", "FDNAME=pipe", fds=[os.pipe()[0]])
        undone, fd = create("undone"), memory(4096)
        luo.preserve_fd(undone, fd, 1)
        tell("FDSTORE=1", "FDNAME=undone", fds=[undone])
        os.close(undone)
        found["grow, the store has the session"] = word(os.ftruncate, fd, MIB)
        tell("FDSTOREREMOVE=1", "FDNAME=undone")
        found["grow, removed from the store"] = word(os.ftruncate, fd, MIB)
        os.close(session)
    Path("/run/keeper.json").write_text(json.dumps(found))
    daemon.notify("READY=1")
    signal.pause()


def leave():
    """Sessions that nobody stores, held by a service which the jump finds running."""
    held = create("full"), create("closed unfinished")
    luo.preserve_fd(held[1], memory(4096, b"left"), 1)
    Path("/run/keeper.json").write_text(json.dumps({"sha256": fill(held[0])}))
    daemon.notify("READY=1")
    signal.pause()


def seals(fd):
    return fcntl.fcntl(fd, F_GET_SEALS)


def take():
    """A session of the previous kernel, to its end."""
    session = retrieve("full")
    fd = luo.retrieve_fd(session, 1)
    found = {
        "close-on-exec": not os.get_inheritable(fd),
        "sha256": sha256(fd),
        "position": os.lseek(fd, 0, os.SEEK_CUR),
        "again": word(retrieve, "full"),
        "the same open file": os.lseek(luo.retrieve_fd(session, 1), 7, 0) == os.lseek(fd, 0, os.SEEK_CUR),
        "seals": seals(luo.retrieve_fd(session, 2)),
        "seals that noexec comes back with": seals(luo.retrieve_fd(session, 3)),
        "unknown token": word(luo.retrieve_fd, session, 99),
        "preserve in it": word(luo.preserve_fd, session, memory(4096), 5),
        "write before finish": word(os.pwrite, fd, b"y", 0),
    }
    outgoing = create("full")  # that one is outgoing, the other came: no conflict
    found["hand on before finish"] = word(luo.preserve_fd, outgoing, fd, 1)
    found["finish"] = word(luo.finish_session, session)
    found["finish again"] = word(luo.finish_session, session)
    found["token after finish"] = word(luo.retrieve_fd, session, 1)
    found["grow after finish"] = word(os.ftruncate, fd, 17 * MIB)
    found["hand on after finish"] = word(luo.preserve_fd, outgoing, fd, 1)
    os.close(session)
    found["session after closing"] = word(retrieve, "full")
    found["write after closing"] = word(os.pwrite, fd, b"y", 0)
    session = retrieve("closed unfinished")
    left = luo.retrieve_fd(session, 1)
    os.close(session)
    found["left by closing"] = os.pread(left, 4, 0).decode()
    found["closing finishes"] = word(luo.preserve_fd, outgoing, left, 2)
    return found


print(json.dumps({"kinds": kinds, "changes": changes, "keep": keep, "leave": leave, "take": take}[sys.argv[1]]()))
'''

KEEPER = """\
[Service]
Type=notify
NotifyAccess=all
FileDescriptorStoreMax=20
FileDescriptorStorePreserve=yes
Environment=PYTHONPATH={home}
ExecStart=/usr/bin/python3 {home}/ask.py {mode}
"""


def prepared(online: Online, disk: Path, mode: str) -> Guest:
    """Boot a guest with the script in it and a keeper that runs `mode`, and the image of the next kernel loaded."""
    guest = online(VERSION, disk=disk)
    guest.wait_online()
    for module in MODULES:
        guest.put(f"{HOME}/{module}", (REPOSITORY / module).read_bytes())
    guest.put(f"{HOME}/ask.py", SCRIPT)
    guest.put("/etc/systemd/system/keeper.service", KEEPER.format(home=HOME, mode=mode))
    guest.run(["systemctl", "daemon-reload"])
    guest.run(["kexec", "-s", "-l", f"{IMAGES}/{VERSION}/bzImage", f"--initrd={INITRD}", "--reuse-cmdline"])
    return guest


def ask(guest: Guest, mode: str) -> dict[str, Any]:
    """Run a mode of the script; what came of each call."""
    result = guest.run(["python3", f"{HOME}/ask.py", mode], env={"PYTHONPATH": HOME})
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def kept(guest: Guest) -> dict[str, Any]:
    """Start the keeper; what it found."""
    guest.run(["systemctl", "start", "keeper"])
    found: dict[str, Any] = json.loads(guest.get("/run/keeper.json"))
    return found


def show(guest: Guest, *words: str) -> str:
    return guest.run(["systemctl", "show", *words]).stdout.strip()


@pytest.mark.proof
def test_the_service_manager_carries_sessions(online: Online, plain_disk: Path) -> None:
    """What the kernel takes and refuses; then `systemctl kexec`, with sessions in a unit's store."""
    guest = prepared(online, plain_disk, "keep")

    assert ask(guest, "kinds") == {
        "the device while it is open": "EBUSY",
        f"a session named {'n' * 63!r}": "ok",
        "a session named ''": "EINVAL",
        "a session named 'kinds'": "EEXIST",
        "a session that did not come": "ENOENT",
        "memfd": "ok",
        "sealed memfd": "ok",
        "empty memfd": "ok",
        "sparse memfd": "ok",
        "its blocks": 1,
        "huge pages": "ENOENT",
        "pipe": "ENOENT",
        "socket": "ENOENT",
        "file on a disk": "ENOENT",
        "/dev/null": "ENOENT",
        "session": "ENOENT",
        "closed": "EBADF",
        "twice": "EBUSY",
        "twice, in another session": "EBUSY",
        "a token in use": "EEXIST",
        "the largest token": "ok",
        "a file out of an outgoing session": "EINVAL",
        "finish of an outgoing session": "EINVAL",
        "name": "kinds",
        "name of no session": "ENOTTY",
    }
    assert ask(guest, "changes") == {
        "write": "ok",
        "store": "ok",
        "write past the end": "EPERM",
        "grow": "EPERM",
        "shrink": "EPERM",
        "seal against writing": "EBUSY",
        "grow, one copy of the session closed": "EPERM",
        "grow, both closed": "ok",
        "preserve again": "ok",
    }
    before = kept(guest)
    assert before == {
        "passed": [],
        "sha256": before["sha256"],
        "grow, the store has the session": "EPERM",
        "grow, removed from the store": "ok",
    }
    assert show(guest, "-P", "NFileDescriptorStore", "keeper") == "3"

    assert guest.kexec().how == "kexec"

    guest.wait_online()
    assert show(guest, "-P", "KExecCount") == "1"
    assert show(guest, "-P", "NFileDescriptorStore", "keeper") == "2"
    assert kept(guest) == {
        "passed": ["plain", "session"],  # no pipe: what LUO does not take is lost with a line on the console
        "sha256": before["sha256"],
        "name": "kept",
        "others take it": "EINVAL",
        "store": "plain",
        "after it was let go": "ENOENT",
    }
    assert show(guest, "-P", "NFileDescriptorStore", "keeper") == "1"


def test_a_jump_with_nothing_stopped(online: Online, plain_disk: Path) -> None:
    """reboot(2) alone: the kernel has the sessions, the service manager knows of nothing; and a session to its end."""
    guest = prepared(online, plain_disk, "leave")
    left = kept(guest)
    guest.run(["sync"])

    assert guest.kexec(argv=("kexec", "-e")).how == "kexec"

    guest.wait_online()
    assert show(guest, "-P", "KExecCount") == "0"
    assert show(guest, "-P", "NFileDescriptorStore", "keeper") == "0"
    assert ask(guest, "take") == {
        "close-on-exec": True,
        "sha256": left["sha256"],
        "position": 12345,
        "again": "EINVAL",
        "the same open file": True,
        "seals": 15,
        "seals that noexec comes back with": 0x3E,
        "unknown token": "ENOENT",
        "preserve in it": "EINVAL",
        "write before finish": "ok",
        "hand on before finish": "EBUSY",
        "finish": "ok",
        "finish again": "ok",
        "token after finish": "ENOENT",
        "grow after finish": "ok",
        "hand on after finish": "ok",
        "session after closing": "ENOENT",
        "write after closing": "ok",
        "left by closing": "left",
        "closing finishes": "ok",
    }
