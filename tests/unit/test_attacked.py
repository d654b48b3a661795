# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an attack on the daemon found: facts of one boot that the next khod must still know, and aborts side by side."""

import asyncio
import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.engine.record_writer import CATCH_UP_SECONDS
from khod.errors import Failed, NotRolledBack, Refused
from khod.handover.record import DEPARTURE
from khod.model import Phase
from khod.simulated.kernel import Rebooted
from tests.unit.scripted import Scripted, deaf, hangs, raises
from tests.unit.virtual import VirtualHost, in_virtual_time, now


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    return VirtualHost(tmp_path)


def load_and_jump(host: VirtualHost) -> None:
    """Do as somebody does with kexec-tools, behind khod's back."""
    with host.request() as request:
        assert request.kernel is not None
        host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim kho_scratch=512M\0", 0)
    with suppress(Rebooted):
        host.kernel.reboot_kexec()


@in_virtual_time
async def test_what_speaks_against_a_handover_outlives_a_restart_while_it_is_verified(host: VirtualHost) -> None:
    """The second khod called it verified: not every producer's last state had left."""
    Scripted(host, "db", restores=True, restore=hangs, timeout=1000)
    engine = await host.started()
    await engine.activate()
    load_and_jump(host)
    first = await host.started()
    assert (await first.queries.status()).phase is Phase.verifying
    await first.stop(jumping=False)
    host.hooks.clear()
    Scripted(host, "db", restores=True)
    second = await host.started()
    await host.seen(lambda event: event.phase in (Phase.degraded, Phase.verified))
    status = await second.queries.status()
    assert status.outcome is Phase.degraded
    assert status.verdict is not None
    assert "khod had not loaded" in status.verdict.reason


async def waiting(host: VirtualHost) -> Engine:
    """A boot in which `db` has not taken back what it left."""
    Scripted(host, "db", restores=True, restore=raises(Failed("no room")))
    await host.jump()
    engine = await host.started()
    await host.seen(lambda event: event.phase is Phase.degraded)
    return engine


@in_virtual_time
async def test_a_reboot_before_everything_was_taken_back_says_what_it_cost(host: VirtualHost) -> None:
    await waiting(host)
    host.kernel.set_fault("cold", True)
    load_and_jump(host)
    status = await (await host.started()).queries.status()
    assert status.claims == []
    assert "db" in status.last_error
    assert "lost" in status.last_error


@in_virtual_time
async def test_the_copy_for_the_jump_goes_with_a_jump_that_does_not_come(host: VirtualHost) -> None:
    """It would stand in for a record that is damaged later, and call another boot verified."""
    Scripted(host, "db")
    engine = await host.started()
    host.kernel.set_fault("reboot_errno", 22)
    with pytest.raises(Failed):
        await host.kexec(engine)
    assert (await engine.queries.status()).phase is Phase.idle
    assert DEPARTURE not in os.listdir(host.store.directory)


@in_virtual_time
async def test_a_session_that_came_is_not_closed_where_the_boot_counts_as_cold(host: VirtualHost) -> None:
    Scripted(host, "db")
    host.kernel.set_fault("cold", True)
    await host.jump()
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.cold_boot
    assert engine.record.arrived_run == engine.record.run, "what is in the store by this run's name came with the boot"


async def on_the_way() -> bool:
    """Say what systemd says while kexec.target has a job."""
    return True


@in_virtual_time
async def test_an_abort_while_the_host_goes_into_what_is_loaded_is_refused(host: VirtualHost) -> None:
    """Whoever asked for it: to unload the image would have the host boot cold, with everything lost."""
    Scripted(host, "db")
    host.shutdown = on_the_way
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    with pytest.raises(Refused, match="on its way"):
        await engine.abort()
    assert host.kernel.loaded
    assert (await engine.queries.status()).phase is Phase.loaded


@in_virtual_time
async def test_aborts_side_by_side_are_one_rollback(host: VirtualHost) -> None:
    Scripted(host, "db", timeout=7, thaw=deaf())
    engine = await host.started()
    await engine.activate()
    began = now()
    aborts = [asyncio.ensure_future(engine.abort())]
    await asyncio.sleep(1)
    aborts += [asyncio.ensure_future(engine.abort()) for _ in range(4)]
    answers = await asyncio.gather(*aborts, return_exceptions=True)
    assert all(isinstance(answer, NotRolledBack) for answer in answers)
    with host.request() as request:
        assert now() - began <= (await engine.queries.plan(request)).rollback_seconds
    assert host.verbs.count("db thaw") == 1


@pytest.mark.parametrize("ends", ["goes on", "stops"])
@in_virtual_time
async def test_a_record_that_could_not_be_written_is_written_later(
    host: VirtualHost, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Left at `rolling_back` it would have the next khod undo, or doubt, what is over long ago."""
    Scripted(host, "db")
    engine = await host.started()
    await engine.activate()
    with monkeypatch.context() as full:
        full.setattr(type(host.store), "write", fails)
        await engine.abort()
        assert on_disk(host) is Phase.active
    if ends == "stops":
        await engine.stop(jumping=False)
    else:
        await asyncio.sleep(sum(CATCH_UP_SECONDS))
    assert on_disk(host) is Phase.idle


def on_disk(host: VirtualHost) -> Phase:
    return host.record.phase


def fails(*_arguments: object, **_more: object) -> None:
    """Stand for a file system that is full."""
    raise OSError(errno.ENOSPC, "No space left on device", "handover.json")
