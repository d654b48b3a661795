# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watchdog over the jump: what arms it, who disarms it, and that nothing of it decides how a handover goes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from jeepney import HeaderFields, Message, Parser, new_error, new_method_return

from khod.config import Config, Deadlines, WatchdogSettings
from khod.errors import Failed
from khod.kernel.host import Watchdog
from khod.model import CheckResult, Phase
from khod.preflight.watchdog import find_obstacle
from khod.simulated.kernel import Rebooted
from khod.systemd import dbus
from khod.systemd.dbus import BusError
from khod.systemd.facts import SystemdFacts
from khod.systemd.watchdog import USEC_INFINITY, ManagerWatchdog, ManagerWatchdogs
from tests.unit.harness import Host

SETTINGS = WatchdogSettings("/dev/watchdog0", 120)
HERE = Watchdog("watchdog0", "i6300ESB timer", armed=False, timeout=30, max_timeout=2046)
MANAGER = ManagerWatchdog("/dev/watchdog0", 0.0)
FILES = {"identity": "i6300ESB timer", "state": "inactive", "timeout": "30", "max_timeout": "2046", "nowayout": "0"}


@dataclass
class Fake(ManagerWatchdogs):
    """systemd's side: `calls` are those that changed something."""

    manager: ManagerWatchdog = MANAGER
    error: BusError | None = None
    hangs: bool = False
    calls: list[str] = field(default_factory=list)

    async def _called(self, what: str) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.calls.append(what)

    async def describe_watchdog(self) -> ManagerWatchdog:
        return self.manager

    async def arm_now(self, seconds: int) -> None:
        await self._called(f"now {seconds}")

    async def arm_at_kexec(self, seconds: int) -> None:
        await self._called(f"at kexec {seconds}")

    async def release(self) -> None:
        await self._called("release")

    async def take_back(self, seconds: int) -> None:
        await self._called(f"take back {seconds}")


def lay(host: Host, **files: str) -> None:
    folder: Path = host.kernel.host_path("/sys/class/watchdog/watchdog0")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (FILES | files).items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def watched(host: Host) -> Fake:
    """A host with a watchdog that khod is to arm."""
    host.config = Config(watchdog=SETTINGS)
    lay(host)
    host.watchdogs = made = Fake()
    return made


async def refuse() -> None:
    raise Failed("systemd says no")


# The way there and back


@pytest.mark.parametrize(("now", "armed"), [(True, ["at kexec 120", "now 120"]), (False, ["at kexec 120"])])
async def test_it_is_armed_for_the_jump_and_disarmed_after_it(
    host: Host, watched: Fake, now: bool, armed: list[str]
) -> None:
    engine = await host.started()
    with host.request() as request, pytest.raises(Rebooted):
        await engine.kexec(replace(request, now=now))
    assert watched.calls == armed
    assert host.record.watchdog == "/dev/watchdog0"
    taken = asyncio.ensure_future(host.seen(lambda event: "any more" in event.message))
    await host.started()
    await taken
    assert watched.calls == [*armed, "take back 120"]
    await host.started()
    assert watched.calls == [*armed, "take back 120"], "once"


async def test_it_is_armed_before_anyone_is_frozen(host: Host, watched: Fake) -> None:
    host.hook("db", {"prepare": "exit 1"})
    engine = await host.started()
    with pytest.raises(Exception, match="db"):
        await host.kexec(engine)
    assert watched.calls == ["at kexec 120", "release"]
    assert host.record.watchdog == ""


async def test_a_jump_that_does_not_come_leaves_nothing_armed(host: Host, watched: Fake) -> None:
    engine = await host.started(orderly=refuse)
    with pytest.raises(Failed, match="says no"):
        await host.kexec(engine)
    assert watched.calls == ["at kexec 120", "release"]
    assert host.record.phase is Phase.idle
    assert host.record.watchdog == ""


async def test_a_load_alone_arms_nothing(host: Host, watched: Fake) -> None:
    await host.kexec(await host.started(), load_only=True)
    assert watched.calls == []


async def test_a_khod_that_died_before_the_jump_leaves_it_to_the_next_one(host: Host, watched: Fake) -> None:
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    engine = await host.started(orderly=hang)
    dead = asyncio.ensure_future(host.kexec(engine))
    await reached.wait()
    with pytest.raises(Failed, match="Everything was rolled back"):
        await host.started()
    assert watched.calls == ["at kexec 120", "release"]
    assert host.record.watchdog == ""
    dead.cancel()


async def test_without_a_device_nothing_is_asked(host: Host, watched: Fake) -> None:
    host.config = Config()
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())
    assert watched.calls == []


@pytest.mark.parametrize("trouble", ["error", "hangs", "gone"])
async def test_a_watchdog_that_cannot_be_armed_ends_no_handover(
    host: Host, watched: Fake, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khod.engine.watchdog.ANSWER_SECONDS", 0.2)
    watched.error = BusError("PID 1 is busy") if trouble == "error" else None
    watched.hangs = trouble == "hangs"
    if trouble == "gone":
        host.config = Config(watchdog=replace(SETTINGS, device="/dev/watchdog7"))
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())
    assert any("no watchdog watches over the jump" in event.message for event in host.events)


# What stands in the way


@pytest.mark.parametrize(
    ("settings", "found", "manager", "words"),
    [
        (SETTINGS, [], MANAGER, "this host has: none"),
        (replace(SETTINGS, device="/dev/watchdog1"), [HERE], MANAGER, "There is no watchdog /dev/watchdog1"),
        (SETTINGS, [HERE], None, "cannot be asked"),
        (SETTINGS, [HERE], replace(MANAGER, device="/dev/watchdog1"), "systemd's watchdog is /dev/watchdog1"),
        (replace(SETTINGS, seconds=3000), [HERE], MANAGER, "takes at most 2046 s"),
        (SETTINGS, [replace(HERE, nowayout=True)], MANAGER, "nowayout"),
    ],
)
def test_what_cannot_be_armed_or_disarmed_is_left_alone(
    settings: WatchdogSettings, found: list[Watchdog], manager: ManagerWatchdog | None, words: str
) -> None:
    obstacle = find_obstacle(settings, found, manager)
    assert obstacle is not None
    assert words in obstacle.why
    assert obstacle.remedy


@pytest.mark.parametrize(
    ("settings", "found", "manager"),
    [
        (SETTINGS, HERE, MANAGER),
        (replace(SETTINGS, device="/dev/watchdog"), HERE, MANAGER),
        (replace(SETTINGS, seconds=9000), replace(HERE, max_timeout=0), MANAGER),
        (SETTINGS, replace(HERE, nowayout=True), replace(MANAGER, runtime_seconds=30.0)),
    ],
    ids=["plain", "by its old name", "no bound", "fed by systemd"],
)
def test_a_watchdog_that_systemd_can_arm(settings: WatchdogSettings, found: Watchdog, manager: ManagerWatchdog) -> None:
    assert find_obstacle(settings, [found], manager) is None


@pytest.mark.parametrize(
    ("parameter", "restore", "result", "words"),
    [
        ("0", 60.0, CheckResult.passed, "is armed for the jump, with 120 s"),
        ("-1", 60.0, CheckResult.warn, "may stop it at the jump"),
        (None, 60.0, CheckResult.warn, "may stop it at the jump"),
        ("0", 600.0, CheckResult.warn, "less than deadlines.restore (600 s)"),
    ],
)
async def test_the_check_says_whether_it_would_watch(
    host: Host,
    watched: Fake,
    monkeypatch: pytest.MonkeyPatch,
    parameter: str | None,
    restore: float,
    result: CheckResult,
    words: str,
) -> None:
    monkeypatch.setattr(SystemdFacts, "describe_watchdog", lambda _facts: watched.manager)
    host.kernel.host_path("/run/systemd/system").mkdir(parents=True)
    host.config = Config(watchdog=SETTINGS, deadlines=Deadlines(restore=restore))
    if parameter is not None:
        path = host.kernel.host_path("/sys/module/watchdog/parameters/stop_on_reboot")
        path.parent.mkdir(parents=True)
        path.write_text(f"{parameter}\n")
    engine = await host.started()
    (found,) = [check for check in await engine.queries.check() if check.name == "watchdog"]
    assert found.result is result
    assert words in found.evidence


# systemd


Properties = dict[str, tuple[str, Any]]


@asynccontextmanager
async def serve_manager(path: Path) -> AsyncIterator[Properties]:
    """Be a systemd that answers Get and Set of these properties; `writes` lists what was set, in order."""
    properties: Properties = {
        "RuntimeWatchdogUSec": ("t", 0),
        "KExecWatchdogUSec": ("t", 0),
        "WatchdogDevice": ("s", ""),
        "writes": ("as", []),
    }

    def answer(message: Message) -> Message:
        _interface, name, *value = message.body
        if name not in properties:
            return new_error(message, "org.freedesktop.DBus.Error.UnknownProperty", "s", (name,))
        if not value:
            return new_method_return(message, "v", (properties[name],))
        usec = value[0][1]
        properties["writes"][1].append(f"{name}={usec}")
        properties[name] = ("t", 0 if usec == USEC_INFINITY else usec)
        return new_method_return(message)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"OK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n")
        parser = Parser()
        while data := await reader.read(4096):
            for message in parser.feed(data):
                reply = answer(message)
                reply.header.fields[HeaderFields.sender] = ":1.0"
                writer.write(reply.serialise(serial=1))
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield properties
    finally:
        server.close()


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dbus, "PRIVATE_SOCKET", str(tmp_path / "private"))
    return tmp_path / "private"


@pytest.mark.parametrize(
    ("act", "writes"),
    [
        (lambda calls: calls.arm_now(120), ["RuntimeWatchdogUSec=120000000"]),
        (lambda calls: calls.arm_at_kexec(120), ["KExecWatchdogUSec=120000000"]),
        (lambda calls: calls.release(), [f"KExecWatchdogUSec={USEC_INFINITY}", f"RuntimeWatchdogUSec={USEC_INFINITY}"]),
        (
            lambda calls: calls.take_back(120),
            [
                "RuntimeWatchdogUSec=120000000",
                f"KExecWatchdogUSec={USEC_INFINITY}",
                f"RuntimeWatchdogUSec={USEC_INFINITY}",
            ],
        ),
    ],
    ids=["now", "at kexec", "release", "take back"],
)
async def test_systemd_is_asked_by_its_properties(
    private: Path, act: Callable[[ManagerWatchdogs], Any], writes: list[str]
) -> None:
    async with serve_manager(private) as manager:
        await act(ManagerWatchdogs())
        assert manager["writes"][1] == writes


async def test_what_systemd_feeds_stays_systemd_s(private: Path) -> None:
    async with serve_manager(private) as manager:
        manager["RuntimeWatchdogUSec"] = ("t", 30_000_000)
        await ManagerWatchdogs().take_back(120)
        assert "RuntimeWatchdogUSec=120000000" not in manager["writes"][1]
        assert await ManagerWatchdogs().describe_watchdog() == ManagerWatchdog("/dev/watchdog0", 0.0)
        manager |= {"WatchdogDevice": ("s", "/dev/watchdog1"), "RuntimeWatchdogUSec": ("t", 30_000_000)}
        assert await ManagerWatchdogs().describe_watchdog() == ManagerWatchdog("/dev/watchdog1", 30.0)


@pytest.mark.parametrize("value", [("s", "0"), None])
async def test_a_systemd_without_these_properties_is_an_error(private: Path, value: tuple[str, Any] | None) -> None:
    async with serve_manager(private) as manager:
        del manager["RuntimeWatchdogUSec"]
        if value is not None:
            manager["RuntimeWatchdogUSec"] = value
        with pytest.raises(BusError):
            await ManagerWatchdogs().describe_watchdog()
