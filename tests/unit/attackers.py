# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients without rights that do their worst, as a process of their own: `python attackers.py SOCKET COUNT`.

Standard library only: it is run as a user who can read little else. Prints a line when it has begun, and goes on until
it is killed.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

HANDOVER, SERVICE = "io.kho.Handover", "org.varlink.service"
MAX_FDS = 253  # SCM_MAX_FD
PIECE = 1 << 14
ATTEMPTS = 8
"""Calls that are sent in one turn, whether or not the ones before were answered."""


def call(method: str, *, more: bool = False, **parameters: object) -> bytes:
    message = {"method": method, "parameters": parameters, **({"more": True} if more else {})}
    return json.dumps(message).encode() + b"\0"


QUESTIONS = [
    call(f"{HANDOVER}.Status"),
    call(f"{HANDOVER}.Check"),
    call(f"{HANDOVER}.Plan"),
    call(f"{HANDOVER}.Plan", now=True),
    call(f"{HANDOVER}.Producers"),
    call(f"{HANDOVER}.Scratch"),
    call(f"{SERVICE}.GetInfo"),
    call(f"{SERVICE}.GetInterfaceDescription", interface=HANDOVER),
    call(f"{SERVICE}.GetInterfaceDescription", interface="io.kho.Producer"),
    call(f"{SERVICE}.GetInterfaceDescription", interface="no.such.Interface"),
]
FORBIDDEN = [
    call(f"{HANDOVER}.Activate"),
    call(f"{HANDOVER}.Abort", force=True),
    call(f"{HANDOVER}.Kexec", kernel={"image": 0}),
    call(f"{HANDOVER}.Check", kernel={"image": -1}),
    call(f"{HANDOVER}.Tree", side="out"),
    call("io.kho.Producer.Register", name="mallory", version=1),
    call("io.kho.Producer.Next"),
]
MONITOR = call(f"{HANDOVER}.Monitor", more=True)


class Attacker:
    """One connection, made again whenever khod ends it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.socket: socket.socket | None = None

    def connect(self) -> socket.socket:
        if self.socket is None:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(1.0)  # where khod's queue is full
            self.socket.connect(self._path)
            self.socket.setblocking(False)
        return self.socket

    def drop(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if fds:
            try:
                socket.send_fds(self.connect(), [data], fds)
                return
            except PermissionError:  # the kernel lets it send none: once more without
                pass
        self.connect().send(data)

    def read(self) -> None:
        with suppress(BlockingIOError):
            while self.connect().recv(PIECE):
                pass


Step = Callable[[Attacker], None]


def flood(calls: Iterator[bytes]) -> Step:
    """Call one method after the other, and read what is answered."""

    def step(attacker: Attacker) -> None:
        with suppress(BlockingIOError):
            for _ in range(ATTEMPTS):
                attacker.send(next(calls))
        attacker.read()

    return step


def send_descriptors(attacker: Attacker) -> None:
    """Pass as many as one message takes with every call; before khod has accepted, too."""
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        with suppress(BlockingIOError):
            attacker.send(QUESTIONS[0], [null] * MAX_FDS)
        attacker.read()
    finally:
        os.close(null)


def send_descriptors_and_go(attacker: Attacker) -> None:
    send_descriptors(attacker)
    attacker.drop()


def dribble(attacker: Attacker) -> None:
    """Send half a message byte by byte."""
    with suppress(BlockingIOError):
        for _ in range(ATTEMPTS):
            attacker.send(b"{")


def endless(attacker: Attacker) -> None:
    """Send a message that does not end."""
    attacker.send(b'{"method": "' + b"x" * PIECE)


def read_nothing(call: bytes) -> Step:
    """Call over and over, and read no answer."""

    def step(attacker: Attacker) -> None:
        attacker.send(call)

    return step


def storm(attacker: Attacker) -> None:
    """Connect and go."""
    attacker.connect()
    attacker.drop()


def storm_with_call(attacker: Attacker) -> None:
    attacker.send(QUESTIONS[1])
    attacker.drop()


def out_of_band(attacker: Attacker) -> None:
    """Send a byte that is there to be read, and is not."""
    attacker.connect().send(b"x", socket.MSG_OOB)


WORST: list[Callable[[], Step]] = [
    lambda: flood(itertools.cycle(QUESTIONS)),
    lambda: send_descriptors,
    lambda: read_nothing(MONITOR),
    lambda: storm,
    lambda: dribble,
    lambda: flood(itertools.cycle(FORBIDDEN)),
    lambda: read_nothing(QUESTIONS[0]),
    lambda: storm_with_call,
    lambda: endless,
    lambda: flood(itertools.cycle([QUESTIONS[1]])),
    lambda: send_descriptors_and_go,
    lambda: out_of_band,
    lambda: flood(itertools.cycle([QUESTIONS[0]])),
    lambda: read_nothing(MONITOR),
]


def attack(path: str, count: int) -> None:
    """Do all of it on so many connections, as fast as it goes."""
    steps = [make() for make in itertools.islice(itertools.cycle(WORST), count)]
    attackers = [Attacker(path) for _ in range(count)]
    for turn in itertools.count():
        for attacker, step in zip(attackers, steps, strict=True):
            try:
                step(attacker)
            except BlockingIOError:
                pass
            except (ConnectionError, TimeoutError, OSError):
                attacker.drop()
        if turn == 1:
            print("begun", flush=True)


@contextmanager
def process(path: str, uid: int, count: int) -> Iterator["subprocess.Popen[str]"]:
    """Have a user attack the socket at `path` on so many connections, and wait until it has begun.

    Of root's rights it keeps the one to read this file: a virtual environment may lie below /root.
    """
    caps = [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *caps]
    command = [*become, sys.executable, __file__, path, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacking:
        try:
            assert attacking.stdout is not None
            assert attacking.stdout.readline(), "an attacker ended"
            yield attacking
        finally:
            attacking.kill()


if __name__ == "__main__":
    attack(sys.argv[1], int(sys.argv[2]))
