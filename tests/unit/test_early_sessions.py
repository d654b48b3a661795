# SPDX-License-Identifier: LGPL-2.1-or-later
"""The early restore of what arrived in LUO sessions, and the verdict on it."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.producer import Producer, Step
from tests.unit.arrived import NEXT
from tests.unit.early import EarlySystem, wait_verdict
from tests.unit.khods import DEADLINE
from tests.unit.luo import Hand, LuoKhod, Mortal

REGISTER = b'{"method": "io.kho.Producer.Register", "parameters": {"name": "kv", "version": 1}}\0'


@pytest.fixture
def system(tmp_path: Path) -> Iterator[EarlySystem]:
    made = EarlySystem(tmp_path)
    yield made
    made.close()


def take_back(hand: Hand) -> bytes:
    """Be told `restore`; what the file has. It is written to afterwards."""
    hand.ready()
    assert hand.told() == "restore"
    (fd,) = hand.fds
    found = os.pread(fd, 99, 0)
    os.pwrite(fd, b"new", 0)
    return found


def assert_verified(system: EarlySystem, khod: LuoKhod, kv: Hand) -> None:
    """Answer `restore` and `finish`: everything arrived as it was, and nothing waits in the kernel."""
    kv.follows("finish")
    kv.ready()
    assert wait_verdict(khod) == {"contents kv": "passed"}
    assert khod.record.phase.value == "verified"
    assert system.emptied()
    kv.close()


def test_what_a_producer_has_written_before_it_died_is_not_called_changed(system: EarlySystem) -> None:
    system.leave([("kv", [])])
    khod = system.start()
    first = Hand(khod, "kv")
    assert take_back(first) == b"of kv"
    first.close()
    khod.go_on()
    second = Hand(khod, "kv")
    assert take_back(second) == b"newkv"
    assert_verified(system, khod, second)


def test_after_a_khod_that_died_the_files_of_who_was_not_told_are_compared(system: EarlySystem) -> None:
    run = system.leave([("kv", []), ("later", ["kv"])])
    system.flip(run, "later")
    killed = system.start()
    first = Hand(killed, "kv")
    take_back(first)
    killed.end(signal.SIGKILL)
    first.close()
    khod = system.start()
    khod.go_on()
    kv, later = Hand(khod, "kv"), Hand(khod, "later", after=["kv"])
    assert take_back(kv) == b"newkv"
    kv.ready()
    assert take_back(later) == b"?f later"
    later.ready()
    for hand in (kv, later):
        assert hand.told() == "finish"
        hand.ready()
    assert wait_verdict(khod) == {"contents kv": "passed", "contents later": "fail"}
    verdict = khod.record.verdict
    assert verdict is not None
    assert verdict.changed == ["later"]
    for hand in (kv, later):
        hand.close()


@pytest.mark.parametrize(
    "first",
    [
        "send = restore.send_descriptor; restore.send_descriptor = lambda *given: die(send(*given))",
        "restore.open = die",
        "tell = restore.EarlyRestore._tell; restore.EarlyRestore._tell = lambda *given: die(tell(*given))",
    ],
    ids=["the session is kept", "nobody is told", "one is told"],
)
def test_all_arrives_wherever_khod_is_killed(system: EarlySystem, first: str) -> None:
    system.leave([("kv", [])])
    killed = system.start(first)
    with killed.connect() as client:
        client.sendall(REGISTER + NEXT)
        killed.died()
    khod = system.start()
    khod.go_on()
    kv = Hand(khod, "kv")
    assert take_back(kv) == b"of kv"
    assert_verified(system, khod, kv)


def test_one_that_connected_before_does_not_get_the_name_as_well(system: EarlySystem) -> None:
    system.leave([("kv", [])])
    khod = system.start()
    rival = khod.connect()
    kv = Hand(khod, "kv")
    take_back(kv)
    rival.sendall(REGISTER)
    khod.go_on()
    assert b"There is a producer kv already" in rival.recv(4096)
    kv.follows("finish")
    kv.ready()
    assert wait_verdict(khod) == {"contents kv": "passed"}
    kv.close()
    rival.close()


def test_whom_khod_does_not_register_connects_again(system: EarlySystem) -> None:
    """The process that connected has ended, and its child has the connection: khod holds nobody by that."""
    system.leave([("kv", [])])
    khod = system.start()
    forked = Mortal(khod, "kv")
    assert take_back(forked) == b"of kv"
    forked._process.end()
    forked.ready()
    khod.go_on()
    with pytest.raises(ConnectionError):
        forked.receive()
    kv = Hand(khod, "kv")
    assert take_back(kv) == b"newkv"
    assert_verified(system, khod, kv)
    forked.close()


def test_a_producer_that_starts_while_khod_dies_has_its_state_of_the_next(system: EarlySystem) -> None:
    system.leave([("kv", [])])
    killed = system.start("restore.EarlyRestore._tell = die")
    found = []

    def restore(step: Step) -> None:
        found.append(os.pread(step.files["table"], 99, 0))

    kv = Producer("kv", restore=restore, socket=system.directory / "socket")
    starting = threading.Thread(target=kv.start)
    starting.start()
    killed.died()
    khod = system.start()
    khod.go_on()
    starting.join(DEADLINE)
    assert found == [b"of kv"], "it has begun without"
    assert wait_verdict(khod) == {"contents kv": "passed"}
    kv.stop()
