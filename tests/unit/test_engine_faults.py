# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever refuses on the way, everything is put back: each fault of the embedded kernel, each veto, each full disk."""

import errno

import pytest

from khod.config import Checks, Config, Deadlines
from khod.errors import Exit, Failed, KhoError, MalformedTree, NotRolledBack, Refused
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.model import Phase
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host

FAULTS = [
    ("veto", 1, Failed, "kho failed to serialize state: -1"),
    ("serialize_errno", 12, Failed, "kho failed to serialize state: -12"),
    ("serialize_errno", 3, Failed, "kho failed to serialize state: -3"),
    ("malformed_tree", True, MalformedTree, ""),
    ("load_errno", errno.EINVAL, Failed, ""),
    ("load_errno", errno.ENOMEM, Failed, ""),
    ("load_errno", errno.EADDRNOTAVAIL, Failed, ""),
    ("load_errno", errno.EKEYREJECTED, Failed, ""),
    ("load_errno", errno.ENODATA, Failed, ""),
    ("reboot_errno", errno.EBUSY, Failed, ""),
    ("reboot_errno", errno.EPERM, Failed, ""),
]


async def put_back(host: Host) -> None:
    """Everything is as it was: a khod that starts now finds nothing to do either."""
    assert not host.kernel.active
    assert not host.kernel.loaded
    assert host.record.phase is Phase.idle
    assert host.record.done == ()
    status = await (await host.started()).queries.status()
    assert status.phase is Phase.idle
    assert status.exit_code == Exit.done


@pytest.mark.parametrize(("fault", "value", "error", "log"), FAULTS)
async def test_a_fault_puts_everything_back(
    host: Host, fault: str, value: object, error: type[KhoError], log: str
) -> None:
    host.hook("a")
    host.kernel.set_fault(fault, value)
    engine = await host.started()
    with pytest.raises(error) as raised:
        await host.kexec(engine)
    assert type(raised.value) is error
    assert raised.value.exit is Exit.failed
    assert raised.value.what
    assert log in host.kernel.kernel_log
    status = await engine.queries.status()
    assert status.phase is Phase.idle
    assert status.done == []
    assert raised.value.what in status.last_error
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    await put_back(host)

    host.kernel.set_fault(fault, None)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert (await (await host.started()).queries.status()).phase is Phase.verified


async def test_reboot_that_comes_back_unloads_before_it_leaves_the_active_phase(host: Host) -> None:
    host.kernel.set_fault("reboot_errno", errno.EBUSY)
    engine = await host.started()
    with pytest.raises(Failed) as raised:
        await host.kexec(engine)
    assert "EBUSY" in raised.value.what
    assert host.kernel.calls == ["active=1", "load", "reboot", "unload", "active=0"]


async def test_a_failure_nobody_thought_of_is_put_back_too(host: Host) -> None:
    """Design: rolling back is entered by any failure."""

    async def broken() -> None:
        raise ValueError("a bug in khod")

    host.hook("a")
    engine = await host.started(orderly=broken)
    with pytest.raises(Exception, match="a bug in khod"):
        await host.kexec(engine)
    assert host.kernel.calls == ["active=1", "load", "unload", "active=0"]
    assert host.verbs == ["a prepare", "a freeze", "a thaw", "a cancel"]
    assert (await engine.queries.status()).phase is Phase.idle


async def test_dt_max_too_small_is_put_back_and_names_dt_max(host: Host) -> None:
    host.kernel.echo_to("/sys/kernel/kho/dt_max", "0x10")
    engine = await host.started()
    with pytest.raises(Failed) as raised:
        await engine.activate()
    assert "dt_max" in raised.value.remedy
    await put_back(host)


async def test_what_does_not_fit_into_scratch_is_refused_before_anyone_is_told(host: Host) -> None:
    host.kernel._set_file("/sys/kernel/kho/scratch_len", b"0x4000\n")
    host.hook("a")
    engine = await host.started()
    with pytest.raises(Refused, match="EADDRNOTAVAIL") as raised:
        await host.kexec(engine)
    assert raised.value.where == "check fit"
    assert host.verbs == host.kernel.calls == []


async def test_what_does_not_fit_into_scratch_after_all_is_put_back(host: Host) -> None:
    host.kernel._set_file("/sys/kernel/kho/scratch_len", b"0x4000\n")
    host.config = Config(checks=Checks(fit="off"))
    engine = await host.started()
    with pytest.raises(Failed) as raised:
        await host.kexec(engine)
    assert "EADDRNOTAVAIL" in raised.value.what
    await put_back(host)


@pytest.mark.parametrize("verb", ["prepare", "freeze"])
async def test_a_veto_is_refused_and_undone_in_reverse(host: Host, verb: str) -> None:
    host.hook("a")
    host.hook("b", {verb: "echo disk is busy >&2; exit 1"}, after=("a",))
    host.hook("c", after=("b",))
    engine = await host.started()
    with pytest.raises(Refused) as raised:
        await engine.activate()
    assert raised.value.exit is Exit.refused
    assert "disk is busy" in raised.value.what
    assert "b" in raised.value.where
    assert host.kernel.calls == []
    prepared = ["a prepare", "b prepare"]
    if verb == "prepare":
        assert host.verbs == [*prepared, "b cancel", "a cancel"], "c was never told anything"
    else:
        frozen = ["a freeze", "b freeze", "b thaw", "a thaw"]
        assert host.verbs == [*prepared, "c prepare", *frozen, "c cancel", "b cancel", "a cancel"]
    await put_back(host)


async def test_a_producer_that_misses_its_deadline_is_told_that_it_is_off(host: Host) -> None:
    host.hook(
        "slow", {"freeze": "sleep 600"}, timeout=2
    )  # seconds, in which a shell must have begun: it notes the verb
    engine = await host.started()
    with pytest.raises(KhoError) as raised:
        await engine.activate()
    assert "slow" in str(raised.value)
    assert host.verbs == ["slow prepare", "slow freeze", "slow thaw", "slow cancel"]
    await put_back(host)


async def test_the_step_s_own_deadline_holds_for_all_producers_together(host: Host) -> None:
    host.config = Config(deadlines=Deadlines(prepare=0.2))
    host.hook("slow", {"prepare": "sleep 600"}, timeout=600)
    engine = await host.started()
    with pytest.raises(Failed) as raised:
        await engine.activate()
    assert "slow" in raised.value.where
    told = [verb for verb in host.verbs if verb != "slow prepare"]  # it may be killed before it has noted that
    assert told == ["slow cancel"]
    await put_back(host)


async def test_a_failed_unload_stands_in_the_status_and_abort_may_be_tried_again(host: Host) -> None:
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    host.kernel.set_fault("unload_errno", errno.EBUSY)
    with pytest.raises(NotRolledBack) as raised:
        await engine.abort()
    assert raised.value.exit is Exit.not_rolled_back
    status = await engine.queries.status()
    assert (status.phase, status.exit_code, status.left) == (Phase.failed, Exit.not_rolled_back, ["activate", "load"])
    assert host.kernel.active, "an image with the state of the active phase is not left without it"
    assert "reboot" in status.remedy
    with pytest.raises(Refused):
        await engine.activate()

    host.kernel.set_fault("unload_errno", None)
    await engine.abort()
    assert (await engine.queries.status()).exit_code == Exit.done
    await put_back(host)


async def test_loading_switched_off_after_the_load_leaves_the_image_and_says_so(host: Host) -> None:
    """kexec_load_disabled refuses an unload too."""
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    host.kernel.echo_to(LOAD_DISABLED, "1")
    with pytest.raises(NotRolledBack):
        await engine.abort()
    assert (await engine.queries.status()).left == ["activate", "load"]
    assert host.kernel.active


async def test_a_failed_deactivation_leaves_failed_and_abort_may_be_tried_again(host: Host) -> None:
    engine = await host.started()
    await engine.activate()
    host.kernel.set_fault("abort_errno", errno.EBUSY)
    with pytest.raises(NotRolledBack):
        await engine.abort()
    status = await engine.queries.status()
    assert (status.phase, status.left, status.kernel_active) == (Phase.failed, ["activate"], True)
    host.kernel.set_fault("abort_errno", None)
    await engine.abort()
    await put_back(host)


@pytest.mark.parametrize(("verb", "undo"), [("freeze", "thaw"), ("prepare", "cancel")])
async def test_a_producer_that_could_not_be_put_back_is_told_again_by_the_next_abort(
    host: Host, verb: str, undo: str
) -> None:
    stuck = host.directory / "stuck"
    stuck.touch()
    host.hook("a", {undo: f"test ! -e {stuck}"})
    engine = await host.started()
    await engine.activate()
    with pytest.raises(NotRolledBack) as raised:
        await engine.abort()
    assert "a" in raised.value.what
    assert not host.kernel.active, "the producer's failure does not stop the others"
    due = ["prepare", "freeze"] if verb == "freeze" else [verb]  # the cancel comes after the thaw
    assert (await engine.queries.status()).left == due
    stuck.unlink()
    told = host.verbs.count(f"a {undo}")
    await engine.abort()
    assert host.verbs.count(f"a {undo}") == told + 1
    await put_back(host)


async def test_hold_keeps_what_was_done_before_the_failed_step(host: Host) -> None:
    host.hook("a")
    host.kernel.set_fault("load_errno", errno.ENOMEM)
    engine = await host.started()
    with pytest.raises(NotRolledBack):
        await host.kexec(engine, hold=True)
    status = await engine.queries.status()
    assert (status.phase, status.kernel_active, status.kernel_loaded) == (Phase.active, True, False)
    assert host.record.phase is Phase.active
    host.kernel.set_fault("load_errno", None)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    assert host.verbs == ["a prepare", "a freeze"]


async def test_hold_after_the_jump_came_back_keeps_the_image_and_abort_clears_it(host: Host) -> None:
    host.kernel.set_fault("reboot_errno", errno.EBUSY)
    engine = await host.started()
    with pytest.raises(NotRolledBack):
        await host.kexec(engine, hold=True)
    assert (await engine.queries.status()).phase is Phase.loaded
    assert host.record.phase is Phase.loaded
    await engine.abort()
    assert host.kernel.calls[-2:] == ["unload", "active=0"]
    await put_back(host)


@pytest.mark.parametrize("limit", ["0", "1"])
async def test_too_few_load_calls_left_are_refused_before_the_kernel_is_touched(host: Host, limit: str) -> None:
    """A load and its undo are two calls of kexec_load_limit_reboot."""
    host.kernel.echo_to(LOAD_LIMIT, limit)
    engine = await host.started()
    with pytest.raises(Refused):
        await host.kexec(engine)
    assert host.kernel.calls == []
    assert (await engine.queries.status()).phase is Phase.idle


async def test_loading_switched_off_is_refused_before_the_kernel_is_touched(host: Host) -> None:
    host.kernel.echo_to(LOAD_DISABLED, "1")
    engine = await host.started()
    with pytest.raises(Refused):
        await host.kexec(engine)
    assert host.kernel.calls == []
