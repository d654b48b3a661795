# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the server is made of: rules, quotas, shares of time, turns, answers for many, the events' log."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from asyncvarlink.interface import varlinksignature

from khod.model import Event, Phase, Status
from khod.server import messages
from khod.server.access import Standing
from khod.server.answers import Answers
from khod.server.events import EventLog, Stream
from khod.server.interface import Handover
from khod.server.lane import Lane
from khod.server.limits import OWN_DESCRIPTORS, Limits, Quota
from khod.server.listener import Listener
from khod.server.load import Allowance, Load
from khod.server.metrics import SystemdMetrics
from khod.server.places import Place, Places
from khod.server.producer_interface import Producer
from khod.server.rules import EVERYONE, OPERATORS, PRODUCERS, RULES, CallKind
from khod.wire import INTERFACE, MAX_FDS, METRICS_INTERFACE, PRODUCER, SERVICE
from tests.unit.harness import Host
from tests.unit.turns import until

LINUX_DESCRIPTORS = (1024, 8192, 524288)  # the usual soft limit, the unit's LimitNOFILE=, systemd's hard limit
ALICE, BOB = 1000, 1001
TURN_SECONDS = 60.0  # so long that no turn of a test ends early


# Rights


def methods(interface: type) -> set[str]:
    return {name for name in vars(interface) if varlinksignature(getattr(interface, name)) is not None}


def test_every_method_has_a_rule_and_no_other_has() -> None:
    handover = {f"{INTERFACE}.{name}" for name in methods(Handover)}
    producer = {f"{PRODUCER}.{name}" for name in methods(Producer)}
    metrics = {f"{METRICS_INTERFACE}.{name}" for name in methods(SystemdMetrics)}
    assert handover | producer | metrics | {f"{SERVICE}.GetInfo", f"{SERVICE}.GetInterfaceDescription"} == RULES.keys()


def test_who_has_no_rights_may_ask_and_nothing_else() -> None:
    open_to_all = {name for name, rule in RULES.items() if rule.callers is EVERYONE}
    assert {RULES[name].kind for name in open_to_all} == {
        CallKind.fixed,
        CallKind.question,
        CallKind.listing,
        CallKind.stream,
        CallKind.conversation,
    }
    assert [name for name in open_to_all if RULES[name].kind is CallKind.conversation] == [f"{PRODUCER}.Next"]
    assert RULES[f"{PRODUCER}.Register"].callers is PRODUCERS
    assert all(rule.callers is OPERATORS for rule in RULES.values() if rule.kind is CallKind.operation)
    assert all(rule.what for rule in RULES.values() if rule.callers is not EVERYONE or rule.image)


# What is sent


def test_replies_are_encoded_as_the_library_does_it() -> None:
    event = Event(1.5, Phase.preparing, "a message \x1b \u2028", "run", None, None)
    signature = varlinksignature(Handover.Monitor)
    assert signature is not None
    theirs = signature.return_type.tojson({"event": event})
    assert json.loads(messages.encode_reply({"event": event}, continues=True)[:-1]) == {
        "parameters": theirs,
        "continues": True,
    }


async def test_a_status_is_encoded_as_the_library_does_it(host: Host) -> None:
    engine = await host.started()
    host.hook("a")
    await engine.activate()
    status: Status = await engine.queries.status()
    signature = varlinksignature(Handover.Status)
    assert signature is not None
    theirs = signature.return_type.tojson({"status": status})
    assert json.loads(messages.encode_reply({"status": status})[:-1]) == {"parameters": theirs}


# Quotas


@pytest.mark.parametrize("descriptors", LINUX_DESCRIPTORS)
def test_whatever_others_hold_there_are_descriptors_for_root_and_for_khod(descriptors: int) -> None:
    limits = Limits.divide_descriptors(descriptors)
    held = limits.others + limits.operators + limits.producers + limits.files
    assert held + OWN_DESCRIPTORS <= descriptors
    assert limits.everyone + OWN_DESCRIPTORS <= descriptors
    assert limits.files >= MAX_FDS, "the largest message must get through some time"


def test_a_quota_bounds_each_user_and_all_together() -> None:
    quota = Quota(10, per_user=6)
    assert quota.take_amount(ALICE, 6)
    assert not quota.take_amount(ALICE)
    assert not quota.take_amount(BOB, 5)
    assert quota.take_amount(BOB, 4)
    quota.give_back(ALICE, 6)
    assert quota.unused_amount == 6
    assert quota.take_amount(BOB, 2)
    assert not quota.take_amount(BOB)


def places(descriptors: int = 8192, per_user: int = 64) -> Places:
    return Places(Limits.divide_descriptors(descriptors), lambda: per_user)


def taken(all_places: Places, uid: int, standing: Standing = Standing.other) -> list[Place]:
    """Take as many places as a user gets."""
    found = []
    while (place := all_places.take_place(uid, standing)) is not None:
        found.append(place)
    return found


def test_one_user_has_no_more_connections_than_the_configuration_allows() -> None:
    every = places()
    assert len(taken(every, ALICE)) == 64
    assert len(taken(every, BOB)) == 64


def test_many_users_together_leave_places_for_another_one_and_for_everyone_with_rights() -> None:
    """A user of a container has 65536 user ids at his disposal."""
    every = places()
    crowd = [place for uid in range(2000, 2500) for place in taken(every, uid)]
    assert len(crowd) <= Limits.divide_descriptors(8192).others
    few = places()
    for uid in range(2000, 2020):
        taken(few, uid)
    assert taken(few, ALICE), "twenty users took what they got"
    assert taken(every, ALICE, Standing.operator)
    assert taken(every, BOB, Standing.producer)
    assert every.take_place(0, Standing.root)


def test_a_place_that_is_left_can_be_taken_again() -> None:
    every = places()
    for _ in range(2):
        for place in taken(every, ALICE):
            place.give_back()
    assert every.connections == 0
    assert not every.askers
    assert all(quota.amount_of(ALICE) == 0 for quota in every.by_standing.values())


@pytest.mark.parametrize("registered", [True, False])
def test_a_producers_connection_is_no_askers_any_more(registered: bool) -> None:
    every = places(per_user=1)
    place = every.take_place(ALICE, Standing.operator)
    assert place is not None
    assert place.reserve_producers()
    place.settle_place(registered=registered)
    assert bool(taken(every, ALICE, Standing.operator)) is registered
    place.give_back()
    assert every.by_standing[Standing.producer].amount_of(ALICE) == 0


# Shares of time


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_allowance_is_a_share_of_the_time() -> None:
    clock = Clock()
    allowance = Allowance(lambda: 0.1, clock)
    used = 0.0
    while clock.now < 10.0:
        if wait := allowance.wait_seconds():
            clock.now += wait
        else:
            clock.now += 0.001
            used += 0.001
            allowance.spend_time(0.001)
    assert 0.5 < used <= 1.01


def test_what_was_not_used_is_no_credit_for_later() -> None:
    clock = Clock()
    allowance = Allowance(lambda: 0.1, clock)
    clock.now = 3600.0
    allowance.spend_time(0.006)
    assert allowance.wait_seconds() > 0


async def test_a_client_that_was_slow_to_admit_keeps_the_next_one_waiting_for_a_moment_only(tmp_path: Path) -> None:
    """The first one after the start has its modules imported; on a busy machine any of them may take long."""
    load, admitted = Load(), asyncio.Event()
    load.note_event(Event(0.0, Phase.rolling_back, "", ""))

    def admit_slowly(sock: socket.socket) -> bool:
        sock.close()
        time.sleep(0.2)
        admitted.set()
        return True

    async def know_all() -> None:
        pass

    shared = SimpleNamespace(load=load, groups=SimpleNamespace(wait_lookup=know_all), trusts_senders=True)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        listening.setblocking(False)
        listener = Listener(listening, cast("Any", SimpleNamespace(shared=shared, admit_client=admit_slowly)))
        client.connect(str(tmp_path / "socket"))
        await admitted.wait()
        assert listener._timer is not None
        assert listener._timer.when() - asyncio.get_running_loop().time() < 1.0
        listener.close()


def test_the_share_falls_while_something_is_under_way_for_those_with_rights() -> None:
    load = Load()
    share = load.make_share(0.5, 0.1)
    reliefs: list[float] = []
    load.on_relief.append(lambda: reliefs.append(share()))
    assert share() == 0.5
    load.begin_call()
    assert share() == 0.1
    load.note_event(Event(0.0, Phase.preparing, "", ""))
    load.end_call()
    assert share() == 0.1, "it goes on, whoever asked for it"
    assert reliefs == []
    load.note_event(Event(0.0, Phase.active, "", ""))
    assert reliefs == [0.5]


# Turns


class Guest:
    """A client of a lane. Each message it gets is noted with its user."""

    def __init__(self, uid: int, heard: list[int], lane: Lane) -> None:
        self.uid = uid
        self.events = 0
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._heard = heard
        self.aborted = False
        self.broken = False
        lane.add_member(self.ours.fileno(), self, 1)

    def handle_ready(self) -> None:
        self.events = 0
        if self.broken:
            raise ValueError("broken")
        if self.ours.recv(1):
            self._heard.append(self.uid)

    def abort_connection(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@asynccontextmanager
async def lane_of(*users: int) -> AsyncIterator[tuple[Lane, list[Guest], list[int]]]:
    lane = Lane(TURN_SECONDS)
    heard: list[int] = []
    guests = [Guest(uid, heard, lane) for uid in users]
    yield lane, guests, heard
    lane.close()
    for guest in guests:
        guest.close()


async def test_users_take_turns_however_many_connections_one_has() -> None:
    async with lane_of(*[ALICE] * 20, BOB) as (_lane, guests, heard):
        for guest in guests:
            guest.theirs.send(b"xx")
        await until(lambda: len(heard) == 42)
    assert heard.index(BOB) <= 1
    assert heard[2:].index(BOB) <= 22, "the second one comes when it is read, after what was collected by then"


async def test_a_fault_in_one_clients_turn_ends_that_client_alone() -> None:
    async with lane_of(ALICE, BOB) as (_lane, (alice, bob), heard):
        faults: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        alice.broken = True
        alice.theirs.send(b"x")
        bob.theirs.send(b"x")
        await until(lambda: heard == [BOB] and alice.aborted)
        assert isinstance(faults[0]["exception"], ValueError)


async def test_a_lane_whose_allowance_is_used_up_is_not_looked_at() -> None:
    clock = Clock()
    allowance = Allowance(lambda: 0.1, clock)
    lane = Lane(TURN_SECONDS, allowance)
    heard: list[int] = []
    guest = Guest(ALICE, heard, lane)
    allowance.spend_time(3600.0)
    guest.theirs.send(b"x")
    for _ in range(100):
        await asyncio.sleep(0)
    assert heard == []
    clock.now = 1e6
    lane.go_on()
    await until(lambda: heard == [ALICE])
    lane.close()
    guest.close()


# Answers for many


async def test_whoever_asks_the_same_at_a_time_gets_one_answer() -> None:
    answers, asked = Answers(), 0
    got: list[bytes] = []
    goes_on = asyncio.Event()

    async def produce() -> bytes:
        nonlocal asked
        asked += 1
        number = asked
        await goes_on.wait()
        return b"%d" % number

    answers.queue_question("status", produce, got.append)
    await asyncio.sleep(0)
    for _ in range(100):
        answers.queue_question("status", produce, got.append)
    assert asked == 1
    goes_on.set()
    await until(lambda: len(got) == 101)
    # Whoever came while the first was computed may know of something newer.
    assert got == [b"1"] + [b"2"] * 100
    assert len({id(answer) for answer in got[1:]}) == 1, "it is encoded once"


async def test_questions_that_are_not_the_same_do_not_wait_for_each_other() -> None:
    answers = Answers()
    got: list[bytes] = []
    never = asyncio.Event()

    async def hang() -> bytes:
        await never.wait()
        return b""

    async def answer() -> bytes:
        return b"status"

    answers.queue_question("check", hang, got.append)
    answers.queue_question("status", answer, got.append)
    await until(lambda: got == [b"status"])
    never.set()


async def test_answers_wait_for_their_allowance_and_those_with_rights_have_their_own() -> None:
    clock = Clock()
    allowance = Allowance(lambda: 0.1, clock)
    others, mine, got = Answers(allowance), Answers(), []
    allowance.spend_time(3600.0)

    async def answer() -> bytes:
        return b"x"

    others.queue_question("status", answer, lambda _answer: got.append("others"))
    mine.queue_question("status", answer, lambda _answer: got.append("mine"))
    await until(lambda: got == ["mine"])
    clock.now = 1e6
    others.go_on()
    await until(lambda: got == ["mine", "others"])


# Monitors


class Monitor:
    """Where a monitor is: it has read all but what came while it does not read."""

    def __init__(self) -> None:
        self.reads = True
        self.sent: list[bytes] = []
        self._unread = 0

    @property
    def is_drained(self) -> bool:
        return self._unread == 0

    def submit_work(self, work: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(work)

    def send_data(self, data: bytes) -> None:
        self.sent.append(data)
        self._unread += not self.reads

    def read(self) -> None:
        self.reads, self._unread = True, 0


def log_of(max_events: int = 100, max_bytes: int = 10_000) -> EventLog:
    return EventLog(lambda: b"last", max_events, max_bytes)


async def test_every_monitor_is_told_each_event_once_and_in_order() -> None:
    log, monitors = log_of(), [Monitor() for _ in range(3)]
    for monitor in monitors:
        Stream(log, monitor, lambda: None).begin_stream(b"first")
    for number in range(200):
        log.append_event(b"%d " % number)
        await asyncio.sleep(0)
    expected = b"first" + b"".join(b"%d " % number for number in range(200))
    await until(lambda: all(b"".join(monitor.sent) == expected for monitor in monitors))
    assert log.kept_bytes < 100, "what everyone was told is not kept"


@pytest.mark.parametrize("bound", [{"max_events": 50}, {"max_bytes": 500}], ids=str)
async def test_what_monitors_do_not_read_is_bounded_over_all_of_them(bound: dict[str, int]) -> None:
    log, monitors, ended = log_of(**bound), [Monitor() for _ in range(100)], []
    streams = [Stream(log, monitor, lambda: ended.append(1)) for monitor in monitors]
    for monitor, stream in zip(monitors, streams, strict=True):
        monitor.reads = False
        stream.begin_stream(b"first")
    for number in range(1000):
        log.append_event(b"%09d " % number)
        assert log.kept_bytes <= 500
    assert all(monitor.sent == [b"first"] for monitor in monitors)
    for monitor, stream in zip(monitors, streams, strict=True):
        monitor.read()
        stream.go_on()
    assert all(monitor.sent == [b"first", b"last"] for monitor in monitors), "it missed some: that is an end"
    assert len(ended) == 100
    assert not log.has_streams


async def test_a_monitor_hears_what_happens_between_its_call_and_its_first_event() -> None:
    log, monitor = log_of(), Monitor()
    stream = Stream(log, monitor, lambda: None)
    log.append_event(b"between")
    stream.begin_stream(b"first ")
    await until(lambda: b"".join(monitor.sent) == b"first between")
    stream.stop_stream()
    assert not log.has_streams


async def test_the_end_comes_after_what_was_not_told_yet() -> None:
    log, monitor, ended = log_of(), Monitor(), asyncio.Event()
    Stream(log, monitor, ended.set).begin_stream(b"first ")
    log.append_event(b"second ")
    log.end_streams()
    await ended.wait()
    assert b"".join(monitor.sent) == b"first second last"
