# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every trouble of every kind of producer at every verb, between two witnesses: nothing stays frozen.

What each trouble is for each kind stands in tests/unit/actors.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from khod.config import Config, Deadlines
from khod.engine import Engine
from khod.errors import Exit, NotRolledBack, Refused
from khod.model import Phase
from khod.producers import qemu
from khod.producers.barrier import Verb
from khod.producers.hooks import Hook
from khod.simulated.kernel import Rebooted
from khod.systemd import dbus, manager
from tests.unit.actors import (
    KEPT,
    NAME,
    NOT_NOW,
    Actor,
    Command,
    Guest,
    LuoKernel,
    Peer,
    Service,
    Trouble,
    serving,
    told,
)
from tests.unit.harness import Host

TABLE = """
kind     verb     veto     deadline  crash    garbage  late
varlink  prepare  off      off       off      off      stuck
varlink  freeze   off      off       off      off      stuck
varlink  thaw     stuck    stuck     gone     gone     stuck
varlink  cancel   stuck    stuck     gone     gone     stuck
varlink  restore  claimed  claimed   claimed  claimed  claimed
varlink  finish   claimed  claimed   claimed  claimed  claimed
hook     prepare  off      off       off      off      off
hook     freeze   off      off       off      off      off
hook     thaw     stuck    stuck     stuck    stuck    stuck
hook     cancel   stuck    stuck     stuck    stuck    stuck
hook     restore  lost     lost      lost     lost     lost
hook     finish   lost     lost      lost     lost     lost
unit     prepare  off      off       off      off      off
unit     freeze   off      off       off      off      stuck
unit     thaw     stuck    stuck     stuck    stuck    stuck
unit     cancel   unasked  unasked   unasked  unasked  unasked
unit     restore  unasked  unasked   unasked  unasked  unasked
unit     finish   unasked  unasked   unasked  unasked  unasked
stop     prepare  off      off       off      off      off
stop     freeze   off      off       off      off      stuck
stop     thaw     stuck    stuck     stuck    stuck    stuck
stop     cancel   unasked  unasked   unasked  unasked  unasked
stop     restore  unasked  unasked   unasked  unasked  unasked
stop     finish   unasked  unasked   unasked  unasked  unasked
qemu     prepare  off      off       off      off      off
qemu     freeze   off      off       off      off      stuck
qemu     thaw     stuck    stuck     stuck    stuck    stuck
qemu     cancel   unasked  unasked   unasked  unasked  unasked
qemu     restore  unasked  unasked   unasked  unasked  unasked
qemu     finish   unasked  unasked   unasked  unasked  unasked
"""
"""What comes of it; `stop` is a unit that is stopped and started.

off      Refused, everything put back at once
gone     Refused, everything put back: what it held has ended with its process
stuck    NotRolledBack, the others put back; `khoctl abort` puts the rest back when the trouble is over
claimed  degraded and named, until it comes back and takes what it left
lost     degraded and named: a hook is told once
unasked  this kind has nothing to do at that verb, and nobody is asked
"""

KINDS: dict[str, Callable[[Host, float], Actor]] = {
    "varlink": Peer,
    "hook": Command,
    "unit": lambda host, timeout: Service(host, timeout, "freeze"),
    "stop": lambda host, timeout: Service(host, timeout, "stop"),
    "qemu": Guest,
}
TIMEOUT = 4.0
"""Seconds the subject has for a verb, far more than it needs. They do not go by: the clock is put forward."""
MISSED = "within 4 s"
LONG = 60.0
"""Seconds the witnesses have: more than it is ever put forward."""

BEFORE_FREEZE = ["first prepare", "last prepare", "first freeze"]
TOLD = {
    Verb.prepare: ["first prepare", "first cancel"],
    Verb.freeze: [*BEFORE_FREEZE, "first thaw", "last cancel", "first cancel"],
}
UNDONE = [*BEFORE_FREEZE, "last freeze", "last thaw", "first thaw", "last cancel", "first cancel"]
RESTORED = ["first restore", "last restore", "first finish", "last finish"]


@dataclass
class Case:
    """One row: the subject between its witnesses."""

    host: Host
    subject: Actor
    verb: Verb
    trouble: Trouble

    ahead: float = 0.0
    """Seconds the event loop's clock was put forward."""

    def arm(self) -> None:
        self.subject.arm(self.verb, self.trouble)

    @property
    def waited_for(self) -> bool:
        """Whether the subject has all its time: a thaw of a unit is told again where the bus goes away."""
        again = isinstance(self.subject, Service) and (self.verb, self.trouble) == (Verb.thaw, Trouble.crash)
        return again or self.trouble in (Trouble.deadline, Trouble.late)

    @asynccontextmanager
    async def time_goes_by(self) -> AsyncIterator[None]:
        """Put the clock forward whenever the subject will not answer; only then is anybody waited for."""
        ageing = asyncio.ensure_future(self._age())
        try:
            yield
        finally:
            ageing.cancel()

    async def _age(self) -> None:
        while self.waited_for:
            await self.subject.stuck()
            self.ahead += TIMEOUT

    def witnesses(self, **refuses: str) -> None:
        """One in the rank before the subject, one in the rank after; `refuses` names the verb that one vetoes."""
        for name, after, before in (("first", (), (NAME,)), ("last", (NAME,), ())):
            script = f'echo {name} "$0" >> {self.host.told}; test "$0" != "{refuses.get(name, "")}" || '
            no = "{ echo no room >&2; exit 1; }"
            commands = {verb.value: ["/bin/sh", "-c", script + no, verb.value] for verb in Verb}
            self.host.hooks.append(Hook(name, LONG, after, before, commands=commands))

    async def reached(self, engine: Engine, phase: Phase) -> None:
        """Wait until khod says that it is in this phase."""
        while engine.machine.phase is not phase:
            await self.host.seen(lambda _event: True)

    def kernel_untouched(self) -> bool:
        return self.host.kernel.calls == [] and not self.host.kernel.active and not self.host.kernel.loaded

    async def at_rest(self, engine: Engine) -> None:
        """Nobody holds anything for khod, nor khod for anybody; and another handover finds everyone able."""
        status = await engine.queries.status()
        assert (status.phase, status.done, status.exit_code) == (Phase.idle, [], Exit.done)
        assert self.host.record.producers == ()
        assert self.subject.held == set()
        assert self.host.fdstore.kept == {}, "LUO sessions"
        self.host.told.unlink()
        self.host.hooks = [hook for hook in self.host.hooks if hook.name not in ("first", "last")]
        await engine.activate()
        assert "frozen" in self.subject.held
        await engine.abort()
        assert self.subject.held == set()


async def off(case: Case) -> None:
    case.witnesses()
    case.arm()
    async with serving(case.host, case.subject) as engine:
        with pytest.raises(Refused) as raised:
            async with case.time_goes_by():
                await case.host.kexec(engine)
        assert raised.value.exit is Exit.refused
        check_reason(case, raised.value.what)
        assert engine.machine.phase is Phase.idle
        assert case.kernel_untouched()
        assert case.host.verbs == TOLD[case.verb]
        await case.subject.recover()
        await case.at_rest(engine)


def check_reason(case: Case, said: str) -> None:
    """The producer is named and what was wrong with it; only where it has all its time is a deadline missed."""
    assert NAME in said
    assert (MISSED in said) == case.waited_for
    assert MISSED not in said or f"{NAME} refuses" not in said, "a missed deadline is no refusal"
    if case.trouble is Trouble.veto:
        assert NOT_NOW.partition(";")[0] in said
    if case.trouble is Trouble.crash and isinstance(case.subject, Peer):
        assert "connection ended" in said


async def stuck(case: Case) -> None:
    forward = case.verb in (Verb.prepare, Verb.freeze)
    case.witnesses(**({} if forward else {"last": "freeze"}))
    case.arm()
    async with serving(case.host, case.subject) as engine:
        with pytest.raises(NotRolledBack) as raised:
            async with case.time_goes_by():
                await case.host.kexec(engine)
        assert raised.value.exit is Exit.not_rolled_back
        check_reason(case, raised.value.what)
        assert forward or "no room" in raised.value.what, "why it was put back at all"
        assert engine.machine.phase is Phase.failed
        assert case.kernel_untouched()
        assert case.host.verbs == (TOLD[case.verb] if forward else UNDONE)
        await case.subject.recover()
        await engine.abort()
        assert case.host.verbs == (TOLD[case.verb] if forward else UNDONE), "nobody else is told twice"
        await case.at_rest(engine)


async def gone_with_its_process(case: Case) -> None:
    case.witnesses(last="freeze")
    case.arm()
    async with serving(case.host, case.subject) as engine:
        with pytest.raises(Refused, match="no room"):
            await case.host.kexec(engine)
        assert f"could not be told: {NAME}" in case.host.events[-1].message
        assert case.kernel_untouched()
        assert case.host.verbs == UNDONE
        await case.subject.recover()
        await case.at_rest(engine)


async def jump(case: Case) -> None:
    """Take the host to its next kernel, with nothing wrong."""
    async with serving(case.host, case.subject) as engine:
        with pytest.raises(Rebooted):
            await case.host.kexec(engine)
    case.subject.rebooted()


async def degraded(case: Case, engine: Engine) -> None:
    async with case.time_goes_by():
        await case.reached(engine, Phase.degraded)
    status = await engine.queries.status()
    assert status.exit_code == Exit.degraded
    assert status.verdict is not None
    assert status.verdict.missing == [NAME]
    assert {"first", "last"} <= set(status.verdict.arrived)
    check_reason(case, status.verdict.reason)
    assert case.host.verbs[-len(RESTORED) :] == RESTORED, "the others have theirs"


async def claimed(case: Case) -> None:
    assert isinstance(case.subject, Peer)
    case.witnesses()
    await jump(case)
    case.arm()
    async with serving(case.host, case.subject) as engine:
        await degraded(case, engine)
        await case.subject.recover()
        await case.reached(engine, Phase.verified)
        status = await engine.queries.status()
        assert (status.exit_code, status.last_error) == (Exit.done, "")
        assert status.verdict is not None
        assert status.verdict.missing == []
        assert {"first", "last", NAME} <= set(status.verdict.arrived)
        assert case.subject.claimed == [KEPT]
        assert case.host.fdstore.kept == {}
        assert case.host.record.producers == ()


async def told_again(case: Case) -> None:
    """Wait for the verdict after the subject, which stayed connected, was told a second time and has failed again."""
    async with case.time_goes_by():
        while sum(event.message.startswith(f"producer {NAME}: ") for event in case.host.events) < 2:
            await case.host.seen(lambda _event: True)


async def lost(case: Case) -> None:
    case.witnesses()
    await jump(case)
    case.arm()
    async with serving(case.host, case.subject) as engine:
        await degraded(case, engine)
        await case.subject.recover()
        assert engine.machine.phase is Phase.degraded


async def unasked(case: Case) -> None:
    await (unasked_before if case.verb is Verb.cancel else unasked_after)(case)


async def unasked_before(case: Case) -> None:
    """In this kernel whatever is asked at all would go wrong from when khod says `cancel` on."""
    case.witnesses(last="freeze")
    async with serving(case.host, case.subject) as engine:
        at_cancel = asyncio.ensure_future(case.host.seen(lambda event: told(event) and "cancel" in event.message))
        at_cancel.add_done_callback(lambda _told: case.arm())
        with pytest.raises(Refused, match="no room"):
            await case.host.kexec(engine)
        assert at_cancel.done()
        assert case.host.verbs == UNDONE
        await case.subject.recover()
        await case.at_rest(engine)


async def unasked_after(case: Case) -> None:
    """In the next kernel nothing of what was frozen is left, and nobody asks."""
    case.witnesses()
    await jump(case)
    case.arm()
    asked = case.subject.asked
    async with serving(case.host, case.subject) as engine:
        await case.reached(engine, Phase.verified)
        status = await engine.queries.status()
        assert status.verdict is not None
        assert NAME not in status.verdict.missing
        assert case.host.verbs[-len(RESTORED) :] == RESTORED
        assert case.subject.asked == asked


OUTCOMES: dict[str, Callable[[Case], Awaitable[None]]] = {
    "off": off,
    "gone": gone_with_its_process,
    "stuck": stuck,
    "claimed": claimed,
    "lost": lost,
    "unasked": unasked,
}


def rows() -> list[tuple[str, str, str, str]]:
    header, *lines = (line.split() for line in TABLE.strip().splitlines())
    return [
        (kind, verb, trouble, what)
        for kind, verb, *all_ in lines
        for trouble, what in zip(header[2:], all_, strict=True)
    ]


def test_the_table_has_every_trouble_of_every_kind_at_every_verb() -> None:
    product = {(kind, verb.value, trouble.value) for kind in KINDS for verb in Verb for trouble in Trouble}
    assert sorted(product) == sorted(row[:3] for row in rows())


@pytest.fixture
def prepared(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], Case]]:
    """A row made ready: nothing of the real host is asked, and the clock is the case's."""
    kernel = host.kernel = LuoKernel(host)

    def make(kind: str, verb: str, trouble: str) -> Case:
        monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(host.directory / "bus"))
        monkeypatch.setattr(manager, "SETTLE_SECONDS", TIMEOUT / 2)
        monkeypatch.setattr(qemu, "GRACE_SECONDS", 0.01)
        host.config = Config(deadlines=replace(Deadlines(), restore=TIMEOUT))
        case = Case(host, KINDS[kind](host, TIMEOUT), Verb(verb), Trouble(trouble))
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + case.ahead)
        return case

    yield make
    kernel.close()


@pytest.mark.parametrize(("kind", "verb", "trouble", "comes_of_it"), rows())
async def test_nothing_stays_frozen(
    prepared: Callable[[str, str, str], Case], kind: str, verb: str, trouble: str, comes_of_it: str
) -> None:
    case = prepared(kind, verb, trouble)
    try:
        await OUTCOMES[comes_of_it](case)
    finally:
        await case.subject.leave()


@pytest.mark.parametrize("verb", ["restore", "finish"])
@pytest.mark.parametrize("trouble", ["veto", "late"])
async def test_who_stays_connected_and_fails_again_is_named_once(
    prepared: Callable[[str, str, str], Case], verb: str, trouble: str
) -> None:
    """And its late answer is still heard: it has no cause to connect again."""
    case = prepared("varlink", verb, trouble)
    case.witnesses()
    try:
        await jump(case)
        case.arm()
        async with serving(case.host, case.subject) as engine:
            await degraded(case, engine)
            await told_again(case)
            verdict = engine.record.verdict
            assert verdict is not None
            assert verdict.missing == [NAME]
            assert verdict.reason.count(NAME) == 1
            await case.subject.recover()
            await case.reached(engine, Phase.verified)
    finally:
        await case.subject.leave()
