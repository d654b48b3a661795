# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod finds that it did not do: an operator's activation, a cold boot, lost state, a bad record."""

from dataclasses import replace

import pytest

from khod.errors import Exit, Refused
from khod.kernel.thread import Workers
from khod.model import Phase
from khod.simulated.kernel import Rebooted
from tests.unit.harness import ACTIVE, Host


def drive_by_hand(host: Host, *, loaded: bool) -> None:
    host.kernel.echo_to(ACTIVE, "1")
    if loaded:
        with host.request() as request:
            assert request.kernel is not None
            host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim\0", 0)
    host.kernel.noted.clear()


@pytest.mark.parametrize("loaded", [False, True])
async def test_activation_behind_khod_s_back_is_foreign(host: Host, loaded: bool) -> None:
    engine = await host.started()
    drive_by_hand(host, loaded=loaded)
    for khod in (engine, await host.started()):
        status = await khod.queries.status()
        assert (status.phase, status.kernel_active, status.kernel_loaded) == (Phase.foreign, True, loaded)
        for asked in (khod.activate, khod.abort):
            with pytest.raises(Refused):
                await asked()
    assert host.kernel.calls == [], "khod touches nothing"
    await khod.abort(force=True)
    assert host.kernel.calls == ["unload", "active=0"][not loaded :]
    assert (await khod.queries.status()).phase is Phase.idle


async def test_foreign_ends_when_whoever_did_it_puts_it_back(host: Host) -> None:
    host.kernel.echo_to(ACTIVE, "1")
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.foreign
    host.kernel.echo_to(ACTIVE, "0")
    assert (await engine.queries.status()).phase is Phase.idle
    await engine.activate()
    assert (await engine.queries.status()).phase == Phase.active


async def test_a_deactivation_behind_khod_s_back_is_inconsistent(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    host.kernel.echo_to(ACTIVE, "0")
    assert (await engine.queries.status()).phase is Phase.inconsistent
    with pytest.raises(Refused):
        await host.kexec(engine)
    with pytest.raises(Refused):
        await engine.abort()
    await engine.abort(force=True)
    assert (await engine.queries.status()).phase is Phase.idle
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]


async def test_a_plain_reset_instead_of_the_jump_is_a_cold_boot(host: Host) -> None:
    host.workers = Workers()  # a khod that is replaced may still write the cause; here it does not die before the next
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    engine = await host.started()
    status = await engine.queries.status()
    assert (status.phase, status.exit_code) == (Phase.cold_boot, Exit.degraded)
    assert status.last_error
    assert status.remedy
    engine = await host.started()
    assert (await engine.queries.status()).phase is Phase.cold_boot, (
        "a restart of khod in the same boot does not lose it"
    )
    await engine.activate()
    assert host.kernel.active


@pytest.mark.parametrize(("fault", "named"), [("lose", "missing"), ("change", "changed")])
async def test_state_that_does_not_arrive_whole_is_degraded(host: Host, fault: str, named: str) -> None:
    engine = await host.started()
    host.kernel.set_fault(fault, True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    for _start in range(2):
        status = await (await host.started()).queries.status()
        assert (status.phase, status.exit_code) == (Phase.degraded, Exit.degraded)
        assert status.verdict is not None
        assert getattr(status.verdict, named) == ["ftrace"]
        assert "ftrace" not in status.verdict.arrived


async def test_a_snapshot_that_is_gone_cannot_prove_anything(host: Host) -> None:
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    for path in sorted(host.store.directory.rglob("snapshots/**/*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert (await (await host.started()).queries.status()).phase is Phase.degraded


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"version": 99}', b"\xff\xfe"])
async def test_a_record_that_cannot_be_understood_is_inconsistent_until_forced(host: Host, raw: bytes) -> None:
    host.store.record_path.write_bytes(raw)
    engine = await host.started()
    status = await engine.queries.status()
    assert status.phase is Phase.inconsistent
    assert status.last_error
    with pytest.raises(Refused):
        await engine.activate()
    with pytest.raises(Refused):
        await engine.abort()
    assert host.store.record_path.read_bytes() == raw, "what an operator must see is not overwritten"
    await engine.abort(force=True)
    assert (await engine.queries.status()).phase is Phase.idle
    assert (await (await host.started()).queries.status()).phase is Phase.idle


async def test_everything_written_is_on_the_disk_before_the_jump(host: Host) -> None:
    """The record, its snapshot and every file of the host: nobody else syncs where nothing is stopped."""
    engine = await host.started()
    with host.request() as request, pytest.raises(Rebooted):
        await engine.kexec(replace(request, now=True))
    last = host.kernel.synced[-1]
    assert last is not None
    assert last.what == "load", "between the load and the reboot"
    assert host.kernel.calls[-1] == "reboot"
    assert host.kernel.synced[0] is None, "and once before anyone is frozen, so that little is left in the blackout"
