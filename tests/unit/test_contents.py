# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contents of preserved files: read while everyone is frozen, compared before their producer has them."""

import asyncio
import math
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from khod.config import Config, Policy, ProducersSettings, VerifySettings
from khod.engine import Engine
from khod.errors import KhoError
from khod.handover.record import ProducerRecord, Record, decode_record, encode_record
from khod.kernel.pages import PAGE_BYTES
from khod.model import Check, CheckResult, FindingSource, Kept, Phase, Spot, Verdict
from khod.producers import contents
from khod.producers.contents import (
    MAX_DESCRIPTORS,
    SPOT_SECONDS,
    TOO_MANY,
    Comparison,
    KeptFiles,
    check_contents,
    compare_pages,
    compare_spot,
    read_spot,
    take_spot,
)
from khod.simulated.kernel import Rebooted
from tests.unit.luo import LuoHost, memfd
from tests.unit.scripted import Scripted, raises
from tests.unit.test_held_files import Giver, held
from tests.unit.virtual import InlineWorker

SETTINGS = VerifySettings(pages=4, whole_bytes=2 * PAGE_BYTES)


@pytest.fixture
def host(tmp_path: Path) -> LuoHost:
    host = LuoHost(tmp_path)
    host.config = Config(verify=SETTINGS)
    return host


@pytest.fixture
def fd() -> Iterator[int]:
    made = memfd(b"what it holds")
    yield made
    os.close(made)


def own_memfds() -> int:
    """How many descriptors of memfds this process has."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith("/memfd:table") for link in links)


async def settled(host: LuoHost, engine: Engine) -> None:
    """Wait until khod has closed what it closes, and the kernel has dropped the sessions of that."""
    await engine._resources.workers.kernel.call_within(lambda: None, "waiting for the closes", 10)
    assert host.luo.outgoing == {}


async def jumped(host: LuoHost, giver: Giver) -> None:
    engine = await host.started()
    async with giver.serving(engine):
        with pytest.raises(Rebooted):
            await host.kexec(engine)


@asynccontextmanager
async def concluded(host: LuoHost, giver: Giver) -> AsyncIterator[tuple[Engine, Verdict]]:
    """The next kernel's khod, once the verification is over, and its verdict."""
    engine = await host.started()
    async with giver.serving(engine):
        while engine.machine.phase not in (Phase.verified, Phase.degraded):
            await host.seen(lambda _event: True)
        verdict = host.record.verdict
        assert verdict is not None
        yield engine, verdict


def contents_check(verdict: Verdict) -> Check:
    return named_check(verdict, "contents kv")


def named_check(verdict: Verdict, name: str) -> Check:
    (check,) = [check for check in verdict.checks if check.name == name]
    return check


def flip(host: LuoHost, page: int = 0) -> None:
    """Flip one bit of the file that has arrived, before anyone takes it."""
    ((fd,),) = [files.values() for files in host.luo._arrived.values()]
    (byte,) = os.pread(fd, 1, page * PAGE_BYTES)
    os.pwrite(fd, bytes([byte ^ 1]), page * PAGE_BYTES)


async def test_contents_that_arrived_are_compared_and_counted(host: LuoHost, fd: int) -> None:
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    async with concluded(host, giver) as (_, verdict):
        assert contents_check(verdict) == Check("contents kv", CheckResult.passed, "table: 1 of 1 pages compared", "")
        assert verdict.reason == ""
        assert "kv" in verdict.arrived


async def test_one_bit_of_a_small_file_degrades_and_is_named(host: LuoHost, fd: int) -> None:
    os.pwrite(fd, b"second page", PAGE_BYTES)
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    flip(host, page=1)
    async with concluded(host, giver) as (engine, verdict):
        assert engine.machine.phase is Phase.degraded
        assert contents_check(verdict).result is CheckResult.fail
        (finding,) = verdict.findings
        assert (finding.source, finding.producer, finding.subject) == (FindingSource.content, "kv", "table")
        assert "page 1" in finding.text
        assert "kv" in verdict.changed
        summary = (await engine.queries.status()).summary
        assert ("other contents than what left (kv)" in summary, "not taken back" in summary) == (True, False)
        assert "kv" not in verdict.arrived


async def test_what_was_found_outlives_a_khod_that_dies_before_the_verification_is_over(host: LuoHost, fd: int) -> None:
    """The next one cannot compare: the producer has its files."""
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    flip(host)
    async with concluded(host, giver) as (_, before):
        assert before.reason
    host.store.write(replace(host.record, phase=Phase.verifying, outcome=Phase.idle))
    engine = await host.started()
    verdict = host.record.verdict
    assert verdict is not None
    assert engine.machine.phase is Phase.degraded
    assert verdict.findings == before.findings
    assert contents_check(verdict) == contents_check(before)
    assert "kv" in verdict.changed


async def test_a_restarted_khod_knows_who_has_its_state_again(host: LuoHost, fd: int) -> None:
    host.config = replace(host.config, producers=ProducersSettings(require=("kv",)))
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    async with concluded(host, giver) as (_, before):
        assert before.reason == ""
    host.store.write(replace(host.record, phase=Phase.verifying, outcome=Phase.idle))
    await host.started()
    verdict = host.record.verdict
    assert verdict is not None
    assert "kv" in verdict.arrived
    assert named_check(verdict, "required").evidence == "have their state: kv"
    assert contents_check(verdict) == contents_check(before)


async def test_a_large_file_says_how_many_pages_were_compared(host: LuoHost, fd: int) -> None:
    os.ftruncate(fd, 1000 * PAGE_BYTES)
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    async with concluded(host, giver) as (_, verdict):
        assert contents_check(verdict).evidence == "table: 4 of 1000 pages compared"


async def test_pages_are_read_after_the_last_yes(host: LuoHost, fd: int) -> None:
    """A producer that shares the memory writes to it while it freezes, after its owner has frozen."""

    async def write() -> None:
        os.pwrite(fd, b"WHAT", 0)

    Scripted(host, "last", after=("kv",)).does["freeze"] = write
    giver = Giver()
    giver.add("prepare", ("table", 1, fd))
    await jumped(host, giver)
    host.hooks.clear()
    async with concluded(host, giver) as (_, verdict):
        assert contents_check(verdict).result is CheckResult.passed
    assert giver.came == {"table": b"WHAT it holds"}


async def test_what_was_read_is_on_disk_before_the_jump(host: LuoHost, fd: int) -> None:
    giver = Giver()
    giver.add("freeze", ("table", 1, fd))
    await jumped(host, giver)
    (holder,) = next(noted.recorded for noted in host.kernel.noted if noted.what == "reboot").producers
    spot = holder.kept[0].spot
    assert spot is not None
    assert (spot.size, spot.pages, len(spot.digest), spot.gap) == (13, (), 64, "")


async def test_a_freeze_that_is_tried_again_reads_again(host: LuoHost, fd: int) -> None:
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fd))
    async with giver.serving(engine):
        Scripted(host, "image").does["freeze"] = raises(OSError(16, "busy"))
        host.hooks.clear()
        await held(host, engine)
        os.pwrite(fd, b"newer", 0)
        with pytest.raises(Rebooted):
            await host.kexec(engine)
    host.hooks.clear()
    async with concluded(host, giver) as (_, verdict):
        assert contents_check(verdict).result is CheckResult.passed


async def test_a_khod_that_was_restarted_compares_nothing_and_does_not_pass_it(
    host: LuoHost, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.config = replace(host.config, policy=Policy(after_daemon_died="resume"))
    engine, giver = await host.started(), Giver()
    giver.add("prepare", ("table", 1, fd))
    async with giver.serving(engine):
        await held(host, engine)
        monkeypatch.setattr(engine.registry.peers, "remove_peer", lambda _peer: None)  # it is dead from here on
        again = await host.started()
        assert again.machine.phase is Phase.prepared
        async with giver.serving(again):
            with pytest.raises(Rebooted):
                await host.kexec(again)
    host.hooks.clear()
    async with concluded(host, giver) as (engine, verdict):
        check = contents_check(verdict)
        assert (check.result, engine.machine.phase) == (CheckResult.skipped, Phase.verified)
        assert "not compared: khod was restarted" in check.evidence


async def test_khod_s_descriptors_are_closed_when_it_is_rolled_back(host: LuoHost, fd: int) -> None:
    engine, giver, before = await host.started(), Giver(), own_memfds()
    giver.add("prepare", ("table", 1, fd))
    async with giver.serving(engine):
        await engine.activate()
        assert own_memfds() > before
        await engine.abort()
        await settled(host, engine)
        assert own_memfds() == before


async def test_khod_s_descriptors_are_closed_when_the_producer_is_gone(host: LuoHost, fd: int) -> None:
    engine, giver, before = await host.started(), Giver(), own_memfds()
    giver.add("prepare", ("table", 1, fd))
    async with giver.serving(engine):
        Scripted(host, "no", after=("kv",)).does["freeze"] = raises(OSError(16, "busy"))
        with pytest.raises(KhoError):
            await engine.activate()
    await settled(host, engine)
    assert own_memfds() == before


def test_files_beyond_the_limit_are_not_compared_and_say_why(fd: int) -> None:
    kept_files = KeptFiles(InlineWorker("files", "A file"))
    before = own_memfds()
    files = [(Kept(f"f{number}", number), fd) for number in range(MAX_DESCRIPTORS + 2)]
    kept_files.keep_files("session", files)
    assert own_memfds() == before + MAX_DESCRIPTORS
    taken = asyncio.run(kept_files.take_spots({"session": [kept for kept, _ in files]}))["session"]
    assert [kept.spot.gap for kept in taken if kept.spot and kept.spot.gap] == [TOO_MANY, TOO_MANY]
    kept_files.release_session("session")
    assert own_memfds() == before


def test_a_producer_with_many_files_leaves_time_for_the_others(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes with each file that is read, and is over after four."""
    kept_files, read = KeptFiles(InlineWorker("files", "A file")), list[Spot]()

    def take(_fd: int, _settings: VerifySettings) -> Spot:
        read.append(Spot(13))
        return read[-1]

    monkeypatch.setattr(contents, "take_spot", take)
    monkeypatch.setattr("khod.producers.contents.time.monotonic", lambda: 0.0 if len(read) < 4 else 2 * SPOT_SECONDS)
    wanted = {"many": [Kept(f"f{number}", number) for number in range(9)], "one": [Kept("f0", 0)]}
    for session, files in wanted.items():
        kept_files.keep_files(session, [(kept, fd) for kept in files])
    taken = asyncio.run(kept_files.take_spots(wanted))
    assert [kept.spot is not None and not kept.spot.gap for kept in taken["many"]] == [True] * 3 + [False] * 6
    assert [kept.spot is not None and not kept.spot.gap for kept in taken["one"]] == [True]
    for session in wanted:
        kept_files.release_session(session)


# One file


def test_a_spot_outlives_the_record() -> None:
    kept = Kept("table", 1, Spot(13, (1, 5), "d" * 64, "m" * 16))
    record = Record(producers=(ProducerRecord("kv", "varlink", kept=(kept,)),))
    (holder,) = decode_record(encode_record(record)).producers
    assert holder.kept[0].spot == kept.spot


@pytest.mark.parametrize("kind", ["a pipe", "write-only"])
def test_a_file_that_cannot_be_read_is_named_and_stops_nothing(fd: int, kind: str) -> None:
    ends = os.pipe()
    odd = ends[0] if kind == "a pipe" else os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    spot = take_spot(odd, SETTINGS)
    assert spot.gap
    assert not spot.digest
    found = compare_spot("kv", Kept("table", 1, spot), fd)
    assert (found.differs, found.gap) == (False, spot.gap)
    for each in {*ends, odd}:
        os.close(each)


def test_another_size_differs(fd: int) -> None:
    spot = take_spot(fd, SETTINGS)
    os.ftruncate(fd, 14)
    found = compare_spot("kv", Kept("table", 1, spot), fd)
    assert found.differs
    assert "14 bytes" in found.other


def test_to_read_a_hole_allocates_nothing() -> None:
    sparse = memfd(b"")
    os.ftruncate(sparse, 1 << 30)
    assert not take_spot(sparse, VerifySettings(pages=64)).gap
    assert os.fstat(sparse).st_blocks == 0
    os.close(sparse)


def test_an_empty_file_is_equal_to_itself() -> None:
    empty = memfd(b"")
    found = compare_spot("kv", Kept("table", 1, take_spot(empty, SETTINGS)), empty)
    assert (found.differs, found.gap, found.compared) == (False, "", 0)
    os.close(empty)


def test_a_difference_that_the_producer_itself_may_have_made_proves_nothing() -> None:
    """An earlier khod of this boot may have given it the file."""
    differs = Comparison("kv", "table", 4, 4, (2,))
    check, findings = check_contents("kv", [differs], given_before=True)
    assert (check.result, findings) == (CheckResult.skipped, [])
    assert "not compared" in check.evidence


def found_share(changed: int, pages: int, rounds: int) -> float:
    """In which share of the rounds a change of so many pages of 1 GiB is found, with so many pages compared."""
    total, chooser = 1 << 18, random.Random(14)
    settings = VerifySettings(pages=pages, whole_bytes=1)

    def read(page: int, buffer: bytearray) -> int:
        buffer[:8] = page.to_bytes(8, "little")
        return 8

    hits = 0
    for _ in range(rounds):
        spot = read_spot(read, total * PAGE_BYTES, settings, chooser)
        first = chooser.randrange(total)

        def read_changed(page: int, buffer: bytearray, first: int = first) -> int:
            buffer[:8] = page.to_bytes(8, "little")
            buffer[0] ^= (page - first) % total < changed
            return 8

        found = compare_pages("kv", "table", spot, read_changed)
        assert (found.compared, found.pages) == (pages, total)
        hits += found.differs
    return hits / rounds


@pytest.mark.parametrize(("changed", "pages"), [(1 << 11, 64), (1 << 12, 64), (1 << 10, 256)])
def test_a_change_is_found_as_often_as_chance_says(changed: int, pages: int) -> None:
    """1 - (1 - k/P)^N, within four standard deviations of so many rounds."""
    rounds = 600
    expected = 1 - (1 - changed / (1 << 18)) ** pages
    bound = 4 * math.sqrt(expected * (1 - expected) / rounds)
    assert abs(found_share(changed, pages, rounds) - expected) <= bound
