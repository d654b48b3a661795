# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket against those who mean ill: garbage, half messages, endless ones, callers without the right, crowds."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from khod.client.handover import Client
from khod.errors import Exit, UsageError
from tests.unit.khods import NOBODY, Khod, call, hung_up, khoctl, public_directory, reply, run

MIB = 1 << 20


@pytest.fixture(scope="module")
def khod() -> Iterator[Khod]:
    """One khod for the whole file: what one client does must not harm the next."""
    with public_directory() as directory:
        made = Khod(directory)
        yield made
        made.close()


@pytest.fixture(autouse=True)
def _still_well(khod: Khod) -> Iterator[None]:
    """After every test khod answers, in the phase it was in, and has nothing to complain of."""
    yield
    assert khod.process.poll() is None, khod.errors.read_text()
    assert khod.ask("Status")["status"]["phase"] == "idle"
    assert "Traceback" not in khod.errors.read_text()
    assert not khod.active


GARBAGE = {
    "no JSON": b"GET / HTTP/1.1\r\n\r\n\0",
    "no UTF-8": b"\xff\xfe\xfd\0",
    "cut off": b'{"method": \0',
    "empty": b"\0",
    "a list": b"[]\0",
    "a number": b"17\0",
    "nested too deep": b"[" * 100_000 + b"\0",
    "a number too long": b"9" * 10_000 + b"\0",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_answered_with_a_sentence_and_a_closed_connection(khod: Khod, garbage: bytes) -> None:
    with khod.connect() as client:
        client.sendall(garbage)
        answer = reply(client)
        assert answer["error"] == "io.kho.Handover.UsageError"
        assert answer["parameters"]["what"]
        assert answer["parameters"]["remedy"]
        assert hung_up(client)


WRONG_CALLS = {
    "no method": {"parameters": {}},
    "a method that is a number": {"method": 3},
    "a method without an interface": {"method": "Status"},
    "an unknown method": {"method": "io.kho.Handover.Explode"},
    "a private name": {"method": "io.kho.Handover.publish"},
    "a dunder": {"method": "io.kho.Handover.__init__"},
    "an unknown interface": {"method": "io.kho.Nothing.Status"},
    "parameters that are a list": {"method": "io.kho.Handover.Status", "parameters": [1]},
    "a parameter too many": {"method": "io.kho.Handover.Abort", "parameters": {"harder": True}},
    "a parameter of another type": {"method": "io.kho.Handover.Abort", "parameters": {"force": "yes"}},
    "a stream without more": {"method": "io.kho.Handover.Monitor"},
    "a descriptor that was not passed": {"method": "io.kho.Handover.Kexec", "parameters": {"kernel": {"image": 3}}},
    "a negative descriptor": {"method": "io.kho.Handover.Kexec", "parameters": {"kernel": {"image": -1}}},
    "an unknown side": {"method": "io.kho.Handover.Tree", "parameters": {"side": "up"}},
}


@pytest.mark.parametrize("wrong", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_wrong_call_is_an_error_and_the_connection_goes_on(khod: Khod, wrong: dict[str, object]) -> None:
    with khod.connect() as client:
        client.sendall(json.dumps(wrong).encode() + b"\0")
        assert "InternalServerError" not in reply(client)["error"]
        assert call(client, "Status")["parameters"]["status"]["phase"] == "idle"


def test_half_a_message_then_nothing(khod: Khod) -> None:
    for part in (b"", b"{", b'{"method": "io.kho.Handover.Activate", "parameters": {}'):
        with khod.connect() as client:
            client.sendall(part)
    with khod.connect() as client:
        client.sendall(b'{"method": "io.kho.Handover.Activate", "parameters": {}')
        client.shutdown(socket.SHUT_WR)
        assert hung_up(client)


def test_calls_in_one_packet_are_answered_in_order(khod: Khod) -> None:
    names = ["io.kho.Handover.Status", "org.varlink.service.GetInfo", "io.kho.Handover.Check"]
    with khod.connect() as client:
        client.sendall(b"".join(json.dumps({"method": name}).encode() + b"\0" for name in names))
        assert [next(iter(reply(client)["parameters"])) for _name in names] == ["status", "vendor", "checks"]


@pytest.mark.parametrize("senders", [1, 8])
def test_an_endless_message_is_refused_long_before_it_fills_memory(khod: Khod, senders: int) -> None:
    """However fast it comes: a client that always has more ready must not keep khod reading for ever."""
    before, piece = khod.resident, bytes(64 * MIB).replace(b"\0", b"x")

    def send(client: socket.socket) -> int:
        sent = 0
        with suppress(ConnectionError):
            while sent < len(piece) * 16:
                sent += client.send(piece)
        return sent

    with khod.connect() as client, ThreadPoolExecutor(senders) as pool:
        client.settimeout(None)
        sent = sum(pool.map(send, [client] * senders))
    assert sent < 8 * MIB, "of the 1 GiB each of them means to send"
    assert khod.resident - before < 32 * MIB


def test_a_message_just_over_the_bound_is_answered(khod: Khod) -> None:
    with khod.connect() as client:
        client.sendall(b'{"method": "' + b"x" * MIB + b'"}')
        answer = reply(client)
        assert answer["error"] == "io.kho.Handover.UsageError"
        assert str(MIB) in answer["parameters"]["what"]
        assert hung_up(client)


def test_a_client_hears_why_its_message_was_not_taken(khod: Khod) -> None:
    """Khod hangs up in the middle of it; what it said before that is still to be read."""
    with Client(khod.socket) as client, pytest.raises(UsageError, match=str(MIB)):
        client.call_method("Kexec", {"kernel": {"cmdline": "x" * 8 * MIB}})


def test_many_large_messages_that_are_each_within_the_bound(khod: Khod) -> None:
    call_ = {"method": "io.kho.Handover.Kexec", "parameters": {"kernel": {"cmdline": "x" * (MIB // 2)}}}
    before = khod.resident
    with khod.connect() as client:
        for _turn in range(40):
            client.sendall(json.dumps(call_).encode() + b"\0")
            assert reply(client)["error"] == "io.kho.Handover.UsageError"
    assert khod.resident - before < 32 * MIB


def test_two_hundred_connections(khod: Khod) -> None:
    with ExitStack() as clients:
        many = [clients.enter_context(khod.connect()) for _number in range(200)]
        for client in many:
            client.sendall(b'{"method": "io.kho.Handover.Status"}\0')
        assert [reply(client)["parameters"]["status"]["phase"] for client in many] == ["idle"] * 200


def test_monitors_that_come_and_go_leave_nothing_behind(khod: Khod) -> None:
    def fds() -> int:
        return len(os.listdir(f"/proc/{khod.process.pid}/fd"))

    before = fds()
    for _turn in range(100):
        with khod.connect() as client:
            client.sendall(b'{"method": "io.kho.Handover.Monitor", "more": true}\0')
            assert reply(client)["continues"]
    khod.ask("Status")
    assert fds() < before + 20


def test_descriptors_no_one_asked_for_are_closed(khod: Khod) -> None:
    before = khod.descriptors
    with khod.connect() as client:
        for _turn in range(20):
            call(client, "Status", files=[client.fileno()] * 10)
        assert khod.descriptors < before + 20


@pytest.mark.parametrize("index", [-1, -2, 2, 253, 1 << 40, True])
@pytest.mark.parametrize("where", ["image", "initrds"])
def test_a_descriptor_is_named_by_its_place_and_by_nothing_else(khod: Khod, index: int, where: str) -> None:
    before = khod.descriptors
    kernel = {"image": 0, "initrds": [1]} | {where: index if where == "image" else [index]}
    with khod.connect() as client, (khod.directory / "file").open("w") as file:
        answer = call(client, "Kexec", files=[file.fileno()] * 2, kernel=kernel, load_only=True)
        assert answer["error"] == "org.varlink.service.InvalidParameter", answer
        assert call(client, "Status")["parameters"]["status"]["phase"] == "idle"
        assert khod.descriptors <= before + 1


def test_each_call_has_the_descriptors_that_came_with_it(khod: Khod) -> None:
    """However they are packed: a call without any before and behind, all sent before the first is read."""
    texts = [f"contents {number}" for number in range(3)]
    files = [khod.directory / text for text in texts]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    plain = b'{"method": "org.varlink.service.GetInfo"}\0'
    with khod.connect() as client, ExitStack() as opened:
        khod.process.send_signal(signal.SIGSTOP)
        for file in files:
            client.sendall(plain)
            fd = opened.enter_context(file.open()).fileno()
            parameters = {"kernel": {"image": 0, "image_name": file.name}}
            check = json.dumps({"method": "io.kho.Handover.Check", "parameters": parameters}).encode() + b"\0"
            socket.send_fds(client, [check + plain], [fd])
        khod.process.send_signal(signal.SIGCONT)
        for _file in files:
            assert reply(client)["parameters"]["vendor"]
            checks = reply(client)["parameters"]["checks"]
            assert [check["result"] for check in checks if check["name"] == "image"] == ["fail"], "it is no kernel"
            assert reply(client)["parameters"]["vendor"]


def test_an_unprivileged_caller_may_look_and_nothing_else(khod: Khod) -> None:
    status = khoctl(khod.socket, "status", "--json", user=NOBODY)
    assert status.code == Exit.done, status.err
    assert status.json["phase"] == "idle"
    for words in (("activate",), ("abort", "--force"), ("kexec", "--image", "/etc/passwd")):
        ended = khoctl(khod.socket, *words, user=NOBODY)
        assert ended.code == Exit.refused, words
        assert str(NOBODY) in ended.err
        assert "root" in ended.err
        assert "Traceback" not in ended.err


CROWD = """
import socket, sys
many = []
for number in range(500):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(sys.argv[1])
    client.settimeout(20)
    many.append(client)
answered = 0
for client in many:
    try:
        client.sendall(b'{"method": "io.kho.Handover.Status"}' + bytes(1))
        answered += bool(client.recv(1))
    except OSError:
        pass
print(answered)
"""


def test_an_unprivileged_crowd_is_bounded_and_root_is_still_heard(khod: Khod) -> None:
    crowd = ["-c", CROWD, str(khod.socket)]
    ended = run(crowd, user=NOBODY)
    assert ended.code == 0, ended.err
    assert 0 < int(ended.out) <= 64, "access.max_connections_per_user"
    assert khod.ask("Status")["status"]["phase"] == "idle"
    assert int(run(crowd, user=NOBODY).out) > 0, "those that left are counted no more"


def test_the_socket_is_introspectable(khod: Khod) -> None:
    with khod.connect() as client:
        answer = call(client, "org.varlink.service.GetInterfaceDescription", interface="io.kho.Handover")
    text = answer["parameters"]["description"]
    for method in ("Status", "Monitor", "Check", "Activate", "Abort", "Kexec", "Tree"):
        assert f"method {method}(" in text
    for error in ("Failed", "Refused", "Unsupported", "NotRolledBack"):
        assert f"error {error} " in text


def test_what_khod_kept_open_is_its_socket_and_no_client(khod: Khod) -> None:
    assert Path(f"/proc/{khod.process.pid}/fd").exists()
    assert oct(khod.socket.stat().st_mode & 0o777) == "0o666"
