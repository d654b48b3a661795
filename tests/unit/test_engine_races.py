# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two things at once, and things that change under a handover's feet."""

import asyncio
import errno
from contextlib import suppress

import pytest

from khod.config import Config, Policy
from khod.errors import ConfigError, Exit, Failed, KhoError, Refused
from khod.kernel.probe import Probed
from khod.model import Phase
from khod.producers.hooks import Hook
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host

UNDONE = ["a prepare", "a freeze", "a thaw", "a cancel"]


async def test_two_aborts_at_once_undo_it_once(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    await asyncio.gather(engine.abort(), engine.abort(), engine.abort())
    assert host.kernel.calls == ["active=1", "load", "unload", "active=0"]
    assert host.verbs == UNDONE
    assert (await engine.queries.status()).phase is Phase.idle


async def test_two_handovers_at_once_are_one_and_a_refusal(host: Host) -> None:
    engine = await host.started()
    outcomes = await asyncio.gather(engine.activate(), engine.activate(), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Busy", "NoneType"]
    assert host.kernel.calls == ["active=1"]


async def test_an_abort_that_called_a_handover_off_does_not_reach_the_next_one(host: Host) -> None:
    host.hook("a", {"prepare": f"test -e {host.directory}/quick || sleep 600"}, timeout=600)
    engine = await host.started()
    activation = asyncio.ensure_future(engine.activate())
    await host.seen(lambda event: event.message.startswith("a: prepare"))
    await engine.abort()
    with pytest.raises(Failed):
        await activation
    (host.directory / "quick").touch()
    await engine.activate()
    assert (await engine.queries.status()).phase is Phase.active


async def test_stop_while_producers_are_asked_puts_back(host: Host) -> None:
    host.hook("a", {"freeze": "sleep 600"}, timeout=600)
    engine = await host.started()
    activation = asyncio.ensure_future(engine.activate())
    await host.seen(lambda event: event.message.startswith("a: freeze"))
    await engine.stop(jumping=False)
    with pytest.raises(Failed):
        await activation
    noted = [verb for verb in host.verbs if verb != "a freeze"]  # it may be killed before it noted that
    assert noted == ["a prepare", "a thaw", "a cancel"]
    assert host.record.phase is Phase.idle


async def test_stop_while_the_kernel_serializes_puts_back(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    host.kernel.gate.clear()
    activation = asyncio.ensure_future(engine.activate())
    await host.seen(lambda event: event.phase is Phase.activating)
    stopping = asyncio.ensure_future(engine.stop(jumping=False))
    await asyncio.sleep(0)  # let it ask
    host.kernel.gate.set()
    await stopping
    with suppress(KhoError):  # it may have ended before it was called off
        await activation
    assert host.kernel.calls == ["active=1", "active=0"]
    assert host.verbs == UNDONE


async def test_the_producers_that_were_frozen_are_thawed_whatever_the_configuration_says_now(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    host.hooks = [Hook("b", commands={"thaw": ["/bin/false"], "cancel": ["/bin/false"]})]
    engine.settings.current = Config(policy=Policy(after_daemon_died="resume"))
    await engine.abort()
    assert host.verbs == UNDONE


async def test_a_broken_producer_file_while_active_does_not_keep_abort_from_its_work(host: Host) -> None:
    host.hook("a")
    engine = await host.started()
    await engine.activate()
    host.broken = ConfigError("`prepair` is no key of a producer's", where="/etc/kho/producers.d/a.toml")
    await engine.abort()
    assert host.verbs == UNDONE
    with pytest.raises(KhoError, match=r"a\.toml"):
        await engine.activate()
    assert (await engine.queries.status()).phase is Phase.idle


async def test_producers_that_cannot_be_told_after_a_restart_stand_in_the_status(host: Host) -> None:
    """Design: a step that cannot be undone does not stop the others; what is left stands in the status."""
    host.hook("a")
    await (await host.started()).activate()
    host.broken = ConfigError("`prepair` is no key of a producer's", where="/etc/kho/producers.d/a.toml")
    engine = host.engine()
    with suppress(KhoError):
        await engine.start()
    assert not host.kernel.active
    status = await engine.queries.status()
    assert (status.phase, status.exit_code) == (Phase.failed, Exit.not_rolled_back)
    assert status.left == ["prepare", "freeze"]
    assert "a.toml" in status.last_error
    host.broken = None
    await engine.abort()
    assert host.verbs == UNDONE
    assert (await engine.queries.status()).phase is Phase.idle


@pytest.mark.parametrize("record", [None, b"{ not whole"])
async def test_force_clears_up_on_a_kernel_without_kho_too(host: Host, record: bytes | None) -> None:
    """Somebody's own `kexec -l`, or a damaged record, on a host that was booted without kho=on."""
    host.prober = lambda: Probed(None, "no KHO here", "boot another")
    with host.request() as request:
        assert request.kernel is not None
        host.kernel.kexec_file_load(request.kernel.fd, request.initrds[0].fd, b"root=/dev/sim\0", 0)
    if record is not None:
        host.store.record_path.write_bytes(record)
    engine = await host.started()
    assert (await engine.queries.status()).phase in (Phase.foreign, Phase.inconsistent)
    with pytest.raises(Refused):
        await engine.abort()
    await engine.abort(force=True)
    assert not host.kernel.loaded
    assert (await engine.queries.status()).phase is Phase.idle


async def test_an_image_unloaded_behind_khod_s_back_is_no_jump(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    host.kernel.kexec_file_load(-1, -1, b"", 1)
    status = await engine.queries.status()
    assert status.phase is Phase.inconsistent
    assert status.kernel_loaded is False
    await engine.abort(force=True)
    assert not host.kernel.active


async def test_status_while_it_is_put_back_answers_at_once(host: Host) -> None:
    engine = await host.started()
    await engine.activate()
    host.kernel.gate.clear()
    abort = asyncio.ensure_future(engine.abort())
    try:
        await host.seen(lambda event: event.phase is Phase.rolling_back)
        status = await engine.queries.status()
        assert status.phase is Phase.rolling_back
        assert status.stale
    finally:
        host.kernel.gate.set()
    await abort


async def test_the_count_of_failed_activations_is_the_kernel_s_own(host: Host) -> None:
    """Only a write the kernel refused leaks: not a jump that came back, not an abort in between."""
    host.config = Config(policy=Policy(max_failed_activations=1))
    host.kernel.set_fault("reboot_errno", errno.EBUSY)
    engine = await host.started()
    for _attempt in range(2):
        with pytest.raises(Failed):
            await host.kexec(engine)
        await engine.activate()
        await engine.abort()
    assert host.record.failed_activations == 0


async def test_a_jump_cannot_be_called_back(host: Host) -> None:
    going, gone = asyncio.Event(), asyncio.Event()

    async def shutdown() -> None:
        going.set()
        await gone.wait()
        host.kernel.reboot_kexec()

    engine = await host.started(orderly=shutdown)
    handover = asyncio.ensure_future(host.kexec(engine))
    await going.wait()
    with pytest.raises(Refused):
        await engine.abort()
    assert host.kernel.loaded
    gone.set()
    with pytest.raises(Rebooted):
        await handover
    assert (await (await host.started()).queries.status()).phase is Phase.verified
