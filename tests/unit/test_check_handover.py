# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl check` promises: where it passes a handover may begin or go on, where it fails `khoctl kexec` is refused."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from khod.engine import Engine
from khod.errors import Failed, NotRolledBack, Refused, UsageError
from khod.model import CheckResult, Phase
from khod.target.target import Request
from tests.unit.scripted import Scripted, hangs, raises
from tests.unit.virtual import VirtualHost, in_virtual_time


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    return VirtualHost(tmp_path)


async def rests(_host: VirtualHost, _engine: Engine) -> None:
    """Nothing is under way."""


async def is_active(_host: VirtualHost, engine: Engine) -> None:
    await engine.activate(by="root (khoctl, process 4711)")


async def is_loaded(host: VirtualHost, engine: Engine) -> None:
    await host.kexec(engine, load_only=True)


async def is_preparing(host: VirtualHost, engine: Engine) -> "asyncio.Future[None]":
    Scripted(host, "slow", timeout=1000, prepare=hangs)
    activation = asyncio.ensure_future(engine.activate(by="root (khoctl, process 4711)"))
    await host.seen(lambda event: event.phase is Phase.preparing)
    return activation


async def has_failed(host: VirtualHost, engine: Engine) -> None:
    Scripted(host, "stuck", thaw=raises(Failed("it does not thaw")))
    await engine.activate()
    with pytest.raises(NotRolledBack):
        await engine.abort()


async def checked(engine: Engine, request: Request | None = None) -> tuple[bool, str]:
    """Whether the check passes, and what it says."""
    checks = await (engine.queries.check(request) if request else engine.queries.check())
    (found,) = [check for check in checks if check.name == "handover"]
    return found.result is CheckResult.passed, found.evidence


@pytest.mark.parametrize(
    ("brought", "without", "with_image"),
    [
        (rests, True, True),
        (is_active, True, True),
        (is_loaded, True, False),
        (is_preparing, False, False),
        (has_failed, False, False),
    ],
)
@in_virtual_time
async def test_the_check_says_what_kexec_would_be_answered(
    host: VirtualHost, brought: Callable[[VirtualHost, Engine], Awaitable[object]], without: bool, with_image: bool
) -> None:
    engine = await host.started()
    under_way = await brought(host, engine)
    passes, evidence = await checked(engine)
    assert passes is without
    with host.request() as request:
        assert (await checked(engine, request))[0] is with_image
    if brought is is_preparing:
        assert "4711" in evidence
    if not with_image:
        with host.request() as request, pytest.raises(Refused):
            await engine.kexec(request)
    if isinstance(under_way, asyncio.Future):
        await engine.abort()
        with pytest.raises(Failed):
            await under_way


@in_virtual_time
async def test_the_plan_has_it_too(host: VirtualHost) -> None:
    engine = await host.started()
    await has_failed(host, engine)
    with host.request() as request:
        (found,) = [check for check in (await engine.queries.plan(request)).checks if check.name == "handover"]
    assert found.result is CheckResult.fail
    assert "khoctl abort" in found.remedy


@in_virtual_time
async def test_a_refusal_in_the_middle_says_what_stays(host: VirtualHost) -> None:
    """Whoever reads 'no room on the disk' must not take the host to be as before: everyone is frozen."""
    for name in ("a", "b"):
        Scripted(host, name)
    engine = await host.started()
    await engine.activate()
    with pytest.raises(UsageError) as refused:
        await engine.kexec(Request())
    for words in ("active", "2 producers frozen", "khoctl abort"):
        assert words in refused.value.remedy
    await engine.abort()
    with pytest.raises(UsageError) as refused:
        await engine.kexec(Request())
    assert "frozen" not in refused.value.remedy
