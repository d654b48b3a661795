# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer whose state khod has, and cannot give back yet, is not started without it: against a khod of ours."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from khod.errors import Unreachable
from khod.producer import Producer, Step
from tests.unit.khods import DEADLINE

FAILED = {"error": "io.kho.Failed", "parameters": {"what": "The session cannot be read", "where": "", "remedy": ""}}


def command(serial: int, verb: str) -> dict[str, Any]:
    """Khod's answer to Next."""
    about = {"serial": serial, "verb": verb, "run": "run-1", "timeout": DEADLINE}
    return {"parameters": {**about, "names": [], "tokens": [], "fds": []}}


class Khod:
    """It tells one producer to restore, and gives these answers to its calls of Next, one each."""

    def __init__(self, path: Path, answers: list[dict[str, Any]]) -> None:
        self._answers = [{"parameters": {"version": 1, "run": "run-1", "told": "restore"}}, *answers]
        self.calls: list[dict[str, Any]] = []
        self.all_answered = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listening.accept()
        text = b""
        with client:
            while data := client.recv(1 << 16):
                *complete, text = (text + data).split(b"\0")
                for call in complete:
                    self.calls.append(json.loads(call)["parameters"])
                    if not self._answers:
                        return
                    client.sendall(json.dumps(self._answers.pop(0)).encode() + b"\0")
                    if not self._answers:
                        self.all_answered.set()

    def close(self) -> None:
        self._listening.close()
        self._thread.join(DEADLINE)


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Callable[..., Khod]]:
    made: list[Khod] = []

    def start(*answers: dict[str, Any]) -> Khod:
        made.append(Khod(tmp_path / "socket", [*answers]))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_start_returns_once_restore_was_called_also_after_an_error_and_other_verbs(
    khod: Callable[..., Khod], tmp_path: Path
) -> None:
    ours = khod(FAILED, command(7, "finish"), command(8, "restore"))
    told: list[str] = []

    def note(step: Step) -> None:
        told.append(step.verb)

    producer = Producer("one", restore=note, finish=note, socket=tmp_path / "socket")
    producer.start()
    assert told == ["finish", "restore"]
    producer.stop()
    assert [call.get("serial") for call in ours.calls[1:4]] == [None, None, 7]


def test_stop_ends_a_start_that_waits_for_what_was_left(khod: Callable[..., Khod], tmp_path: Path) -> None:
    ours = khod(FAILED)
    producer = Producer("one", socket=tmp_path / "socket")

    def stop() -> None:
        assert ours.all_answered.wait(DEADLINE)
        producer.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Unreachable):
        producer.start()
    stopping.join()


def test_a_producer_that_is_stopped_before_its_start_does_not_register(
    khod: Callable[..., Khod], tmp_path: Path
) -> None:
    ours = khod(FAILED)
    producer = Producer("one", socket=tmp_path / "socket")
    producer.stop()
    with pytest.raises(Unreachable, match="stopped"):
        producer.start()
    assert ours.calls == []
