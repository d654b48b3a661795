# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registrations outlive khod, not the boot: a handover goes without nobody that was there before khod was restarted."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import ConfigError, Exit, KhoError, Refused
from khod.handover.record import Owner, Process
from khod.model import CheckResult, Phase
from khod.producers.identity import process_of
from khod.producers.peer import Peer, Registration
from khod.producers.peers import RETURN_SECONDS
from khod.producers.registrations import MAX_LINES, RegisteredProducer, Registrations
from tests.unit.harness import ACTIVE
from tests.unit.khods import Khod
from tests.unit.luo import Hand
from tests.unit.scripted import Scripted
from tests.unit.test_engine_limits import fill, mount
from tests.unit.virtual import VirtualHost, in_virtual_time, now

OWNER = Owner(1000, "kv.service")
DEAD = Process(2**22, 1)
"""A process that is there no more: pid_max is no higher."""


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    made = VirtualHost(tmp_path)
    made.registrations = tmp_path / "registrations"
    return made


def own() -> Process:
    process = process_of(os.getpid())
    assert process is not None
    return process


async def register(engine: Engine, name: str = "kv", process: Process | None = None, owner: Owner = OWNER) -> Peer:
    return await engine.register_producer(name, owner, process or own(), Registration())


async def restarted(host: VirtualHost, *processes: Process | None) -> Engine:
    """A khod after one that had a producer for each of these processes, None for a process that lives on."""
    engine = await host.started()
    for number, process in enumerate(processes):
        await register(engine, f"kv{number}" if number else "kv", process)
    engine.registry.peers.stop_remembering()  # or, with a khod that is killed, nothing at all
    return await host.started()


async def refusal(engine: Engine) -> str:
    with pytest.raises(Refused) as raised:
        await engine.activate()
    assert engine.machine.phase is Phase.idle
    return str(raised.value)


@in_virtual_time
async def test_a_producer_whose_process_lives_is_waited_for_and_then_named(host: VirtualHost) -> None:
    Scripted(host, "a")
    engine = await restarted(host, None)
    began = now()
    said = await refusal(engine)
    assert now() - began == RETURN_SECONDS
    assert "kv" in said
    assert str(os.getpid()) in said
    assert host.verbs == []
    status = await engine.queries.status()
    assert "kv" in status.waiting_for
    assert "kv" in status.summary
    (check,) = [check for check in await engine.queries.check() if check.name == "producers"]
    assert check.result is CheckResult.fail


@in_virtual_time
async def test_a_producer_that_returns_takes_part_again(host: VirtualHost) -> None:
    engine = await restarted(host, None)
    peer = await register(engine)
    assert (await engine.queries.status()).waiting_for == []
    assert [found.name for found in await engine.queries.producers()] == ["kv"]
    assert peer.is_reachable


@in_virtual_time
async def test_one_that_died_while_khod_was_down_is_named_at_once_until_it_is_given_up(host: VirtualHost) -> None:
    engine = await restarted(host, DEAD, DEAD)
    said = await refusal(engine)
    assert now() == 0
    assert "kv" in said
    assert "kv1" in said
    assert "ended while khod was down" in said
    engine = await host.started()
    assert "kv1" in await refusal(engine), "and after another restart"
    await engine.forget_producer("kv1")
    said = await refusal(engine)
    assert "kv1" not in said
    await engine.forget_producer("kv")
    await engine.activate()
    await engine.abort()
    engine = await host.started()
    await engine.activate()


@in_virtual_time
async def test_a_leave_is_a_leave(host: VirtualHost) -> None:
    engine = await host.started()
    engine.registry.peers.remove_peer(await register(engine))
    engine = await host.started()
    await engine.activate()
    assert engine.machine.phase is Phase.active


@in_virtual_time
async def test_another_boot_expects_nobody(host: VirtualHost) -> None:
    await restarted(host, None)
    host.kernel._boot_kernel("root=/dev/sim rw")
    await (await host.started()).activate()


@pytest.mark.parametrize("owner", [Owner(1001, "kv.service"), Owner(1000, "other.service"), Owner(1000, "")], ids=str)
@in_virtual_time
async def test_the_name_of_one_that_is_not_back_is_nobody_else_s(host: VirtualHost, owner: Owner) -> None:
    engine = await restarted(host, None)
    with pytest.raises(Refused, match=r"kv\.service"):
        await register(engine, owner=owner)
    assert "kv" in await refusal(engine)
    await engine.forget_producer("kv")
    await register(engine, owner=owner)


@in_virtual_time
async def test_a_handover_under_way_is_put_back_with_those_of_its_record(host: VirtualHost) -> None:
    """They are waited for by the rollback itself; afterwards they are missed as anyone is."""
    Scripted(host, "a")
    engine = await restarted(host, DEAD)
    await engine.forget_producer("kv")
    await engine.activate()
    with pytest.raises(KhoError):
        await host.engine().start()
    assert host.verbs[-2:] == ["a thaw", "a cancel"]


@in_virtual_time
async def test_an_image_of_somebody_else_s_is_put_back_without_those_that_are_not_back(host: VirtualHost) -> None:
    """Nobody was told anything of it: they are missed as before, and can be given up."""
    Scripted(host, "a")
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    await restarted(host, DEAD)
    host.kernel.echo_to(ACTIVE, "1")
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.foreign
    told = len(host.verbs)
    await engine.abort(force=True)
    assert not host.kernel.active
    assert host.verbs[told:] == []
    assert "kv" not in [found.name for found in await engine.queries.producers()]
    assert "kv" in await refusal(engine)
    await engine.forget_producer("kv")
    await engine.activate()


# The file


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda raw: raw[:-20],
    "cut off, and gone on": lambda raw: raw[:-20] + b"\n" + raw,
    "zeros": lambda raw: raw + bytes(512),
    "no object": lambda raw: b"[1]\nnull\n17\n" + raw,
    "too deep": lambda raw: b"[" * 100_000 + b"\n" + raw,
    "empty": lambda _raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@in_virtual_time
async def test_a_damaged_list_costs_no_start_and_no_line_but_its_own(host: VirtualHost, damage: str) -> None:
    engine = await host.started()
    await register(engine, "first", DEAD)
    await register(engine, "last", DEAD)
    assert host.registrations is not None
    host.registrations.write_bytes(DAMAGE[damage](host.registrations.read_bytes()))
    engine = await host.started()
    known = set((await engine.queries.status()).waiting_for)
    lost = {"cut off": {"last"}, "empty": {"first", "last"}}.get(damage, set())
    assert known == {"first", "last"} - lost


@in_virtual_time
async def test_a_list_that_cannot_be_read_ends_no_start_and_no_rollback(host: VirtualHost) -> None:
    Scripted(host, "a")
    await (await host.started()).activate()
    assert host.registrations is not None
    host.registrations.unlink()
    host.registrations.mkdir()
    engine = host.engine()
    with pytest.raises(KhoError):
        await engine.start()
    assert host.verbs[-2:] == ["a thaw", "a cancel"]
    await register(engine)
    assert any("not kept" in event.message for event in host.events)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with no room for anything."""
    path = tmp_path / "full"
    path.mkdir()
    mount(path, "size=64k,nr_inodes=16")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@in_virtual_time
async def test_a_full_disk_is_told_and_refuses_nobody(host: VirtualHost, full: Path) -> None:
    host.registrations = full / "registrations"
    engine = await host.started()
    fill(full)
    for number in range(64):  # the last page of the file has room for a few
        await register(engine, f"kv{number}")
    assert any("not kept" in event.message and "No space left" in event.message for event in host.events)
    assert len(await engine.queries.producers()) == 64
    known = (await (await host.started()).queries.status()).waiting_for
    assert known == [f"kv{number}" for number in range(len(known))], "a line is whole or not there"


def test_a_long_list_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "registrations"
    registrations = Registrations(path)
    registrations.load_registered("boot")
    for _turn in range(MAX_LINES):
        registrations.add_registered(RegisteredProducer("kv", OWNER, DEAD))
        registrations.remove_name("kv")
    registrations.add_registered(RegisteredProducer("last", OWNER, DEAD))
    assert path.stat().st_size < 1 << 22
    assert [found.name for found in Registrations(path).load_registered("boot")] == ["last"]


def test_a_write_that_takes_only_part_of_a_line_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registrations = Registrations(tmp_path / "registrations")
    registrations.load_registered("boot")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: write(fd, line[:10]))
    with pytest.raises(OSError, match="space") as raised:
        registrations.add_registered(RegisteredProducer("kv", OWNER, DEAD))
    assert raised.value.errno == errno.ENOSPC


# A file of the same name


@in_virtual_time
async def test_a_file_that_comes_under_a_peer_s_name_stops_a_handover_and_no_rollback(host: VirtualHost) -> None:
    """A handover that went without either of them would lose its state."""
    Scripted(host, "a")
    engine = await host.started()
    await engine.activate()
    await engine.abort()
    peer = await register(engine, "pool")
    Scripted(host, "pool")
    (check,) = [check for check in await engine.queries.check() if check.name == "producers"]
    assert check.result is CheckResult.fail
    assert "pool" in check.evidence
    with pytest.raises(KhoError, match="pool") as raised:
        await engine.activate()
    assert isinstance(raised.value, ConfigError | Refused)
    assert [found.kind for found in await engine.queries.producers() if found.name == "pool"] == ["scripted", "varlink"]
    engine.registry.peers.remove_peer(peer)
    await engine.activate()
    assert "pool freeze" in host.verbs


# As processes


def test_a_killed_khod_is_followed_by_one_that_misses_its_producers(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    peer = Hand(khod, "kv")
    khod.process.kill()
    khod.process.wait()
    peer.close()
    khod.close()
    khod = Khod(tmp_path)
    assert khod.khoctl("status", "--json").json["waiting_for"] == ["kv"]
    refused = khod.khoctl("check")
    assert refused.code != Exit.done
    assert khod.khoctl("producers", "forget", "kv").code == Exit.done
    assert khod.khoctl("activate").code == Exit.done
    khod.close()
