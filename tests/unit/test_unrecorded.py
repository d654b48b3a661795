# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the record does not say may have been done: whoever may have been told is told the undo, or is named."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from khod.errors import Exit, NotRolledBack
from khod.handover.record import Record
from khod.model import Phase
from khod.producers.barrier import ProducerCall
from khod.producers.hooks import Hook
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.khods import Khod
from tests.unit.luo import Hand, System, begin
from tests.unit.scripted import Scripted, raises
from tests.unit.virtual import VirtualHost, in_virtual_time

TOLD = ["a prepare", "b prepare", "a freeze", "b freeze"]
UNDONE = ["b thaw", "a thaw", "b cancel", "a cancel"]


@pytest.fixture
def host(tmp_path: Path) -> VirtualHost:
    return VirtualHost(tmp_path)


# The record is lost while producers are frozen


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "version": lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
    "removed": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "of another run": lambda path: path.write_bytes(b"[]"),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
@in_virtual_time
async def test_without_its_record_a_handover_is_put_back_by_force_for_everyone(
    host: VirtualHost, damage: str, loaded: bool
) -> None:
    """That the kernel is active proves that somebody was frozen."""
    Scripted(host, "a")
    Scripted(host, "b", after=("a",))
    engine = await host.started()
    await (host.kexec(engine, load_only=True) if loaded else engine.activate())
    DAMAGE[damage](host.store.record_path)
    engine = await host.started()
    assert "`Abort(force)`" in (await engine.queries.status()).remedy
    await engine.abort(force=True)
    assert host.verbs == [*TOLD, *UNDONE]
    status = await engine.queries.status()
    assert (status.phase, status.exit_code) == (Phase.idle, Exit.done)
    assert (host.kernel.active, host.kernel.loaded) == (False, False)
    await (await host.started()).activate()


@in_virtual_time
async def test_who_cannot_be_put_back_by_force_is_named(host: VirtualHost) -> None:
    Scripted(host, "a")
    b = Scripted(host, "b", after=("a",))
    await (await host.started()).activate()
    host.store.record_path.unlink()
    engine = await host.started()
    b.does["thaw"] = raises(OSError(5, "no"))
    with pytest.raises(NotRolledBack, match="b"):
        await engine.abort(force=True)
    assert (await engine.queries.status()).phase is Phase.failed
    engine = await host.started()
    b.does.clear()
    await engine.abort()
    assert host.verbs[-2:] == ["b thaw", "b cancel"]


# Somebody comes while it is under way


@in_virtual_time
async def test_a_late_producer_is_recorded_before_it_is_told_anything(host: VirtualHost) -> None:
    Scripted(host, "a")
    engine = await host.started()
    await engine.activate()
    seen: list[tuple[str, Record]] = []

    class Late(Scripted):
        async def carry_out(self, telling: ProducerCall) -> None:
            seen.append((telling.verb.value, host.record))
            telling.note = f"{telling.verb.value} left this"
            await super().carry_out(telling)

    Late(host, "late", after=("a",))
    await host.kexec(engine, load_only=True)
    assert [verb for verb, _ in seen] == ["prepare", "freeze"]
    for verb, record in seen:
        late = {holder.name: holder for holder in record.producers}["late"]
        assert late.note == {"prepare": "", "freeze": "prepare left this"}[verb], "nor may what it left be lost"
    assert {holder.name: holder.note for holder in host.record.producers}["late"] == "freeze left this"
    await engine.abort()
    assert host.verbs[-4:] == ["late thaw", "a thaw", "late cancel", "a cancel"]


def hook(system: System, name: str) -> Path:
    frozen = system.directory / f"{name}-frozen"
    system.hook(name, f'freeze = ["touch", "{frozen}"]\nthaw = ["rm", "-f", "{frozen}"]\n')
    return frozen


@contextmanager
def load(system: System, khod: Khod) -> Iterator[None]:
    """Ask khod for the image to be loaded, and do not wait."""
    with ExitStack() as files:
        fds = [files.enter_context((system.directory / name).open("rb")).fileno() for name in ("vmlinuz", "initrd")]
        with begin(khod, "Kexec", files=fds, kernel={"image": 0, "initrds": [1]}, load_only=True):
            yield


POINTS = [
    "late: prepare: told",
    "late: prepare: ready",
    "late: freeze: told",
    "late: freeze: ready",
    "loading: the kernel takes",
]


@pytest.mark.parametrize("point", POINTS)
def test_khod_killed_while_a_late_hook_is_brought_up_leaves_nobody_frozen(system: System, point: str) -> None:
    first = hook(system, "first")
    khod = system.khod(dies_at=point)
    assert khod.khoctl("activate").code == Exit.done
    late = hook(system, "late")
    with load(system, khod):
        khod.died()
    khod = system.khod()
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    assert not khod.active
    assert not first.exists()
    assert not late.exists()


def test_khod_killed_while_a_late_peer_is_brought_up_still_counts_on_it(system: System) -> None:
    hook(system, "first")
    khod = system.khod()
    assert khod.khoctl("activate").code == Exit.done
    peer = Hand(khod, "late")
    with load(system, khod):
        peer.ready()
        assert peer.told() == "prepare"
        assert "late" in [holder.name for holder in khod.record.producers]
        peer.ready()
        assert peer.told() == "freeze"
        khod.end(signal.SIGKILL)
    peer.close()
    khod = system.khod(ready=False).listening()
    peer = Hand(khod, "late")
    peer.follows("thaw", "cancel")
    peer.ready()
    khod.word("READY=1")
    assert khod.khoctl("status", "--json").json["phase"] == "idle"
    peer.close()


# What is not there any more in the next kernel


def restores(name: str, *verbs: str) -> Hook:
    return Hook(name, 10.0, commands={verb: ["/bin/true"] for verb in verbs})


class Unit(Scripted):
    kind = "unit"


NEXT: dict[str, Callable[[Host], object]] = {
    "its file is gone": lambda _host: None,
    "another kind has its name": lambda host: Unit(host, "pool", restores=True),
    "it restores nothing any more": lambda host: host.hooks.append(restores("pool", "freeze", "thaw")),
}


@pytest.mark.parametrize("what", NEXT)
async def test_a_hook_that_nobody_restores_is_missing(tmp_path: Path, what: str) -> None:
    host = Host(tmp_path)
    host.hooks = [restores("pool", "freeze", "restore"), restores("other", "restore"), restores("plain", "freeze")]
    engine = await host.started()
    with pytest.raises(Rebooted):
        await host.kexec(engine)
    host.hooks = [hook for hook in host.hooks if hook.name == "other"]
    NEXT[what](host)
    engine = await host.started()
    while engine.machine.phase is Phase.verifying:
        await host.seen(lambda _event: True)
    status = await engine.queries.status()
    assert (status.phase, status.exit_code, status.claims) == (Phase.degraded, Exit.degraded, ["pool"])
    assert status.verdict is not None
    assert status.verdict.missing == ["pool"]
    assert "other" in status.verdict.arrived
    await engine.forget_producer("pool")
    await engine.activate()
