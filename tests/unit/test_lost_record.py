# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of the handover that led here cannot be read: what arrived is kept, named, and freed one by one alone."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from khod.errors import Exit, KhoError, Refused
from khod.handover.directory import FILE_NAME
from khod.handover.record import DEPARTURE
from khod.model import CheckResult, Phase
from tests.unit.luo import Hand, LuoHost, System, memfd, one_file
from tests.unit.test_claims import host, jump, taken_back, waiting

__all__ = ["host"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def another_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "version": another_version,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 4096),
    "no object": lambda path: path.write_text("[]"),
    "removed": Path.unlink,
    "a directory": directory,
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_what_left_beside_the_record_stands_in_for_it(host: LuoHost, damage: str) -> None:
    await jump(host)
    DAMAGE[damage](host.store.record_path)
    await taken_back(host, await host.started())


@pytest.mark.parametrize("damage", [*DAMAGE, "all is gone"])
async def test_without_any_record_what_arrived_is_kept_and_named(host: LuoHost, damage: str) -> None:
    await jump(host)
    if damage == "all is gone":
        shutil.rmtree(host.store.directory)
        host.store.directory.mkdir()
    else:
        DAMAGE[damage](host.store.record_path)
        DAMAGE[damage](host.store.directory / DEPARTURE)
    for _start in range(2):
        engine = await host.started()
        assert waiting(host)
        status = await engine.queries.status()
        assert status.exit_code != Exit.done
        assert status.claims == list(host.fdstore.kept)
    with pytest.raises(KhoError):
        await engine.activate()
    if engine.machine.phase is Phase.inconsistent:
        await engine.abort(force=True)
        assert waiting(host)
    failed = [check for check in await engine.queries.check() if check.name == "claims"]
    assert [check.result for check in failed] == [CheckResult.fail]
    (session,) = host.fdstore.kept
    assert session in failed[0].evidence
    with pytest.raises(Refused):
        await engine.forget_producer("kv")
    assert waiting(host)
    await engine.forget_producer(session)
    assert (host.fdstore.kept, host.luo.unclaimed) == ({}, set())
    assert (await engine.queries.status()).claims == []
    await engine.activate()


async def test_a_session_of_another_s_is_kept_too(host: LuoHost) -> None:
    """A record that can be read names its own sessions, and says nothing of the others."""
    fd = host.kernel.create_session("khod-000000000000-0123456789abcdef")
    host.fdstore.store_fd("khod-000000000000-0123456789abcdef", fd)
    os.close(fd)
    for _start in range(2):
        engine = await host.started()
        assert (await engine.queries.status()).claims == ["khod-000000000000-0123456789abcdef"]
    await engine.forget_producer("khod-000000000000-0123456789abcdef")
    assert host.fdstore.kept == {}


# As processes


def test_khoctl_frees_a_session_that_no_record_knows(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.carries = True
    khod = system.khod()
    peer = Hand(khod, "cache")
    system.mortal.append(peer.close)
    fd = memfd()
    handing = threading.Thread(target=hand_over, args=(peer, fd))
    handing.start()
    system.jump(khod)
    handing.join()
    os.close(fd)
    for name in (FILE_NAME, DEPARTURE):
        another_version(tmp_path / "state" / name)
    (session,) = system.kept
    khod = system.khod()
    assert khod.khoctl("verify").code != Exit.done
    assert khod.khoctl("status", "--json").json["claims"] == [session]
    assert khod.khoctl("abort", "--force").code == Exit.done
    assert system.luo.unclaimed == {session}
    assert khod.khoctl("producers", "forget", session).code == Exit.done
    assert system.emptied()
    system.close()


def hand_over(peer: Hand, fd: int) -> None:
    """Say yes to everything, with one file."""
    peer.ready()
    assert peer.told() == "prepare"
    peer.ready(**one_file(fd))
    assert peer.told() == "freeze"
    peer.ready()
