# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image into which handovers failed is refused until an acknowledgement; the counting is tests of the history."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khod.config import Config, Deadlines, TrialSettings
from khod.errors import CheckFailed, Failed
from khod.history.trial import ImageTrial, Past
from khod.model import Check, CheckResult
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.images import CPIO, bzimage
from tests.unit.test_preflight import Site

FAILED = ImageTrial("", failures=1, run="0123456789ab", reason="the next kernel panicked", at=1e9)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


PAIR = sha256(f"{sha256(bzimage())}{sha256(CPIO)}".encode())
BARE = sha256(sha256(bzimage()).encode())


async def checked(host: Host, initrd: str | None = "initrd") -> Check | None:
    engine = await host.started()
    with host.request(initrd=initrd) as request:
        found = await engine.queries.check(request)
    return next((check for check in found if check.name == "trial"), None)


def answer(trial: ImageTrial) -> Callable[[str], Awaitable[Past]]:
    async def read(_digest: str) -> Past:
        return Past(trial)

    return read


@pytest.mark.parametrize(
    ("trial", "bound", "result", "words"),
    [
        (ImageTrial(""), 1, CheckResult.passed, "No handover into this kernel and initrd was verified yet"),
        (ImageTrial("", verified=True), 1, CheckResult.passed, "was verified"),
        (FAILED, 1, CheckResult.fail, "failed, last in run 0123456789ab"),
        (FAILED, 2, CheckResult.warn, "After 2 failures it is refused"),
        (replace(FAILED, failures=2), 2, CheckResult.fail, "failed 2 times in a row"),
    ],
)
async def test_an_image_is_judged_by_its_handovers(
    host: Host, trial: ImageTrial, bound: int, result: CheckResult, words: str
) -> None:
    host.config, host.past = Config(trial=TrialSettings(bound)), answer(trial)
    found = await checked(host)
    assert found is not None
    assert found.result is result
    assert words in found.evidence
    if trial.failures:
        assert trial.reason in found.evidence
    assert (result is CheckResult.fail) is (f"khoctl history ack {FAILED.run}" in found.remedy)


async def test_a_barred_image_is_refused_before_anyone_is_told(host: Host) -> None:
    host.hook("db")
    host.past = answer(FAILED)
    engine = await host.started()
    with pytest.raises(CheckFailed) as refused:
        await host.kexec(engine)
    assert refused.value.check == "trial"
    assert FAILED.reason in str(refused.value)
    assert host.verbs == []
    assert host.kernel.calls == []


@pytest.mark.parametrize(("initrd", "digest"), [("initrd", PAIR), (None, BARE)])
async def test_the_pair_that_boots_is_asked_for(host: Host, initrd: str | None, digest: str) -> None:
    asked = []

    async def read(wanted: str) -> Past:
        asked.append(wanted)
        return Past(ImageTrial(wanted))

    host.past = read
    await checked(host, initrd)
    assert asked == [digest]


@pytest.mark.parametrize("error", [Failed("The history database cannot be used"), OSError(5, "EIO"), KeyError("x")])
async def test_a_history_that_fails_bars_nothing(host: Host, error: Exception) -> None:
    async def broken(_digest: str) -> Past:
        raise error

    host.past = broken
    found = await checked(host)
    assert found is not None
    assert found.result is CheckResult.skipped
    assert "not known" in found.evidence
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())


async def test_a_history_that_hangs_is_given_up(host: Host) -> None:
    host.config = Config(deadlines=Deadlines(activate=0.2))

    async def hang(_digest: str) -> Past:
        await asyncio.Event().wait()
        raise AssertionError

    host.past = hang
    found = await checked(host)
    assert found is not None
    assert found.result is CheckResult.skipped


def test_a_host_without_a_history_has_no_such_check(tmp_path: Path) -> None:
    site = Site(tmp_path)
    target = site.image(bzimage())
    assert "trial" not in site.checks(target)
    target.close()


async def test_an_image_that_ended_as_a_cold_boot_is_refused_until_it_is_acknowledged(host: Host) -> None:
    engine = await host.started()
    host.kernel.set_fault("cold", True)
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    engine = await host.started()
    failed = await host.remembered()
    await engine.history.remember(failed)

    with pytest.raises(CheckFailed) as refused:
        await host.kexec(engine)
    assert failed.summary.run in str(refused.value)
    assert failed.summary.reason in str(refused.value)

    await engine.history.acknowledge(failed.summary.run, "root")
    with pytest.raises(Rebooted):
        await host.kexec(engine)
