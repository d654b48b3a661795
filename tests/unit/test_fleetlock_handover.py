# SPDX-License-Identifier: LGPL-2.1-or-later
"""No handover begins without the lock of the fleet, whatever the server does; it is released in steady state alone."""

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from khod.errors import Exit
from khod.files import Fragment
from khod.producers.fleetlock import SANDBOX
from khod.producers.order import order_in_ranks
from khod.producers.service_settings import read_settings
from tests.unit.fleetlock import FAULTS, LOCK, UNLOCK, Authority, Server, close_early, configure, hang, serving
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, reply, run
from tests.unit.test_hooks import Rehearsed

MAIN_FAULTS = ("refuses", "hangs")
OTHER_FAULTS = sorted(FAULTS.keys() - {*MAIN_FAULTS})
OTHER = "f" * 32
UNIT = REPOSITORY / "systemd/khod-fleetlock@.service"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as made:
        yield made


@pytest.fixture
def khod(tmp_path: Path, server: Server) -> Iterator[Khod]:
    """A khod with the server's file, and a hook that notes what it is told in `told`."""
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    configure(tmp_path / "root", server)
    write_hook(tmp_path)
    made = Khod(tmp_path)
    yield made
    made.close()


def write_hook(directory: Path, **commands: str) -> None:
    """The hook notes its verbs; a verb in `commands` runs that shell text besides."""
    verbs = ("prepare", "freeze", "thaw", "cancel", "restore", "finish")
    script = f"echo $KHO_VERB >> {directory}/told; "
    lines = [f"{verb} = {json.dumps(['/bin/sh', '-c', script + commands.get(verb, 'true')])}" for verb in verbs]
    path = directory / "root/etc/kho/producers.d/db.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def told(khod: Khod) -> list[str]:
    path = khod.directory / "told"
    return path.read_text().split() if path.exists() else []


def kexec(khod: Khod, *words: str) -> Answer:
    images = [f"--image={khod.directory / 'vmlinuz'}", f"--initrd={khod.directory / 'initrd'}"]
    return khod.khoctl("kexec", *images, *words)


def fleetlock(khod: Khod, command: str, *words: str) -> Answer:
    return run(["-m", "khod.fleetlock", command, f"--root={khod.directory / 'root'}", *words])


def settle(khod: Khod) -> Answer:
    return fleetlock(khod, "settle", f"--socket={khod.socket}")


def phase(khod: Khod) -> str:
    shown: str = khod.khoctl("status", "--json").json["phase"]
    return shown


# With a server that works


def test_the_lock_is_held_over_the_jump_and_released_once_verified(khod: Khod, server: Server) -> None:
    assert kexec(khod).code == Exit.done
    khod.word("READY=1")
    assert told(khod)[:2] == ["prepare", "freeze"]
    assert server.requests == [LOCK, LOCK], "it was confirmed before anything was frozen"
    assert len(server.holders) == 1
    assert khod.khoctl("verify").code == Exit.done
    settled = settle(khod)
    assert (settled.code, server.holders) == (Exit.done, []), settled
    assert server.requests == [LOCK, LOCK, UNLOCK]


@pytest.mark.parametrize("words", [["activate"], ["kexec", "--load-only"]], ids=lambda words: words[-1])
def test_an_abort_releases_the_lock_after_all_else(khod: Khod, server: Server, words: list[str]) -> None:
    ended = khod.khoctl("activate") if words == ["activate"] else kexec(khod, "--load-only")
    assert ended.code == Exit.done, ended
    assert len(server.holders) == 1
    assert khod.khoctl("abort").code == Exit.done
    assert server.holders == []
    assert told(khod)[-1] == "cancel"


def test_it_is_first_in_the_order_and_last_to_be_released(khod: Khod) -> None:
    plan = {step["step"]: step["does"] for step in khod.khoctl("plan", "--json").json["steps"]}
    assert plan["prepare"].startswith("get the lock (fleetlock), 20.1 s at most; then tell db to prepare")
    assert plan["freeze"].startswith("tell db to freeze")
    names = [row["name"] for row in khod.khoctl("producers", "--json").json]
    assert names == ["fleetlock", "db"]
    tested = khod.khoctl("producers", "test", "fleetlock")
    assert tested.code == Exit.done, tested


def test_leaders_are_a_rank_of_their_own_whatever_others_say() -> None:
    first = Rehearsed("db", [], before=("fleetlock",))
    ranks = order_in_ranks([first, Rehearsed("cache", [], after=("fleetlock",)), Rehearsed("fleetlock", [])])
    assert [[one.name for one in rank] for rank in ranks] == [["fleetlock"], ["cache", "db"]]


def test_a_lock_that_becomes_free_within_the_deadline_is_taken(khod: Khod, server: Server) -> None:
    configure(khod.directory / "root", server, deadline=20)
    server.holders = [OTHER]
    with khod.connect() as client:
        client.sendall(b'{"method": "io.kho.Handover.Activate"}\0')
        server.wait_for(LOCK, 2)
        assert told(khod) == []
        server.holders = []
        assert "error" not in reply(client)
    assert told(khod) == ["prepare", "freeze"]


def test_the_other_producers_have_their_deadline_once_the_lock_is_there(khod: Khod, server: Server) -> None:
    (khod.directory / "root/etc/kho/khod.toml").write_text("[deadlines]\nprepare = 0.1\n")
    write_hook(khod.directory, prepare="sleep 60")
    khod.process.send_signal(signal.SIGHUP)
    khod.word("READY=1")
    refused = khod.khoctl("activate")
    assert refused.code == Exit.failed
    assert "prepare within 0.1 s" in refused.err
    assert server.requests == [LOCK, UNLOCK]


# With one that does not


@pytest.mark.parametrize("name", [*MAIN_FAULTS, *(pytest.param(n, marks=pytest.mark.proof) for n in OTHER_FAULTS)])
def test_no_handover_begins(khod: Khod, server: Server, name: str) -> None:
    server.fault, said = FAULTS[name]
    if said.startswith("no answer"):
        configure(khod.directory / "root", server, timeout=0.5)
    refused = kexec(khod)
    assert refused.code == Exit.refused, refused
    for word in (said, server.url, "Everything was rolled back"):
        assert word in " ".join(refused.err.split()), refused.err
    assert (told(khod), khod.active, khod.loaded, phase(khod)) == ([], False, False, "idle")


def test_a_server_that_is_not_there(khod: Khod, server: Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        configure(khod.directory / "root", server, url=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        refused = khod.khoctl("activate")
    assert refused.code == Exit.refused
    assert "ECONNREFUSED" in refused.err
    assert told(khod) == []


def test_a_server_with_a_bad_certificate(khod: Khod) -> None:
    authority, stranger = (Authority(khod.directory, name) for name in ("ca", "stranger"))
    with serving(Server(stranger.serve(stranger.issue("server")))) as other:
        configure(khod.directory / "root", other, ca=authority.certificate, deadline=600)
        refused = kexec(khod)
        assert refused.code == Exit.refused
        assert "the server's certificate is not valid" in " ".join(refused.err.split())
        assert other.requests == []
    assert (told(khod), khod.loaded, phase(khod)) == ([], False, "idle")


def test_a_refusal_that_cannot_change_is_not_repeated(khod: Khod, server: Server) -> None:
    configure(khod.directory / "root", server, deadline=600)
    server.fault = FAULTS["redirect"][0]
    assert khod.khoctl("activate").code == Exit.refused
    assert server.requests == [LOCK, UNLOCK]


@pytest.mark.parametrize("taken", [True, False], ids=["another host has it", "the server hangs"])
def test_a_lock_that_is_lost_ends_the_handover_before_anything_is_frozen(
    khod: Khod, server: Server, taken: bool
) -> None:
    def lose(handler: object) -> None:
        assert handler
        server.fault = None if taken else hang
        server.holders = [OTHER]

    server.fault, server.faulty = None, {LOCK}
    configure(khod.directory / "root", server, deadline=600 if taken else 0.1, timeout=5 if taken else 0.5)
    gate = khod.directory / "gate"
    subprocess.run(["mkfifo", gate], check=True)
    write_hook(khod.directory, prepare=f"read go < {gate}")
    with khod.connect() as client:
        client.sendall(b'{"method": "io.kho.Handover.Activate"}\0')
        with gate.open("w") as go:  # the hook runs: the lock is held
            lose(server)
            go.write("go\n")
        what = reply(client)["parameters"]["what"]
    assert "The lock is not held any more" in what
    assert ("all slots are taken" if taken else "no answer within 0.5 s") in what
    assert told(khod) == ["prepare", "cancel"]
    assert (server.holders, khod.active, phase(khod)) == ([OTHER], False, "idle")


def test_a_lock_that_is_lost_while_the_handover_is_held_is_missed_by_the_jump(khod: Khod, server: Server) -> None:
    assert khod.khoctl("activate").code == Exit.done
    server.holders = [OTHER]
    refused = kexec(khod, "--hold")
    assert refused.code == Exit.refused, refused
    assert told(khod) == ["prepare", "freeze", "thaw", "cancel"]
    assert (khod.active, khod.loaded) == (False, False)


def test_a_veto_of_another_producer_releases_the_lock(khod: Khod, server: Server) -> None:
    write_hook(khod.directory, prepare="exit 1")
    assert khod.khoctl("activate").code == Exit.refused
    assert (server.holders, server.requests) == ([], [LOCK, UNLOCK])


def test_a_host_that_is_not_put_back_keeps_the_lock_until_it_is(khod: Khod, server: Server) -> None:
    write_hook(khod.directory, thaw="exit 1")
    assert khod.khoctl("activate").code == Exit.done
    assert khod.khoctl("abort").code == Exit.not_rolled_back
    assert phase(khod) == "failed"
    assert len(server.holders) == 1
    kept = settle(khod)
    assert kept.code == Exit.failed
    assert "keeps its lock" in kept.err
    assert len(server.holders) == 1
    write_hook(khod.directory)
    assert khod.khoctl("abort").code == Exit.done
    assert (server.holders, phase(khod)) == ([], "idle")


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_khod_that_ends_releases_the_lock_or_the_next_one_does(khod: Khod, server: Server, ended: int) -> None:
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.Signals(ended))
    assert len(server.holders) == (0 if ended == signal.SIGTERM else 1)
    again = Khod(khod.directory)
    try:
        assert phase(again) == "idle"
        assert server.holders == []
    finally:
        again.close()


def test_a_khod_that_resumes_confirms_the_lock(khod: Khod, server: Server) -> None:
    (khod.directory / "root/etc/kho/khod.toml").write_text('[policy]\nafter_daemon_died = "resume"\n')
    assert khod.khoctl("activate").code == Exit.done
    khod.end(signal.SIGKILL)
    server.requests.clear()
    again = Khod(khod.directory)
    try:
        assert phase(again) == "active"
        server.holders = [OTHER]
        refused = kexec(again)
        assert refused.code == Exit.refused
        assert "The lock is not held any more" in " ".join(refused.err.split())
        assert server.requests == [LOCK, UNLOCK]
        assert told(again)[-2:] == ["thaw", "cancel"]
    finally:
        again.close()


def test_a_lock_that_cannot_be_released_stops_no_rollback(khod: Khod, server: Server) -> None:
    assert khod.khoctl("activate").code == Exit.done
    server.fault, server.faulty = close_early, {UNLOCK}
    assert khod.khoctl("abort").code == Exit.done
    assert phase(khod) == "idle"
    row = khod.khoctl("producers", "--json").json[0]
    assert "not released now" in row["answer"]
    assert settle(khod).code == Exit.failed
    server.fault = None
    assert settle(khod).code == Exit.done
    assert server.holders == []


def test_a_release_that_is_still_tried_takes_no_lock_from_a_handover(khod: Khod, server: Server) -> None:
    configure(khod.directory / "root", server, deadline=DEADLINE)
    server.fault, server.faulty = close_early, {UNLOCK}
    with ThreadPoolExecutor() as threads:
        settling = threads.submit(settle, khod)
        server.wait_for(UNLOCK, 2)
        assert khod.khoctl("activate").code == Exit.done
        server.fault = None
        settled = settling.result()
    assert settled.code == Exit.failed
    assert "khod is not in its steady state, but" in " ".join(settled.err.split())
    assert len(server.holders) == 1


# After a bad handover


@pytest.mark.parametrize("fault", ["lose", "cold"])
@pytest.mark.parametrize("keeps", [True, pytest.param(False, marks=pytest.mark.proof)], ids=["kept", "released"])
def test_a_bad_handover_keeps_the_lock_where_that_is_configured(
    khod: Khod, server: Server, fault: str, keeps: bool
) -> None:
    outcome = {"lose": "degraded", "cold": "cold_boot"}[fault]
    if keeps:
        configure(khod.directory / "root", server, keep_after=[outcome])
    if fault == "lose":
        write_hook(khod.directory, restore="exit 1")
    else:
        write_hook(khod.directory)
        khod.kernel.set_fault(fault, True)
    kexec(khod)
    khod.word("READY=1")
    khod.khoctl("verify")
    assert phase(khod) == outcome
    settled = settle(khod)
    assert settled.code == (Exit.degraded if keeps else Exit.done), settled
    assert len(server.holders) == keeps
    if keeps:
        assert "khod-fleetlock unlock" in settled.err
        khod.khoctl("producers", "forget", "db")  # what was lost must be given up before another handover
        assert khod.khoctl("activate").code == Exit.done, "the host that has the lock may try again"
        assert khod.khoctl("abort").code == Exit.done
        assert len(server.holders) == 1, "and keeps it where that is rolled back"
        assert fleetlock(khod, "unlock").code == Exit.done
        assert server.holders == []


def test_without_khod_the_lock_is_kept(khod: Khod, server: Server) -> None:
    assert fleetlock(khod, "lock").code == Exit.done
    khod.end(signal.SIGKILL)
    kept = settle(khod)
    assert kept.code == Exit.unreachable
    assert len(server.holders) == 1


def test_no_handover_begins_with_a_file_that_is_wrong(khod: Khod, server: Server) -> None:
    (khod.directory / "root/etc/kho/fleetlock.toml").write_text('url = "https://h"\nurls = 1\n')
    refused = khod.khoctl("activate")
    assert refused.code != Exit.done
    assert "fleetlock.toml:2" in refused.err
    assert (told(khod), server.requests) == ([], [])


def test_the_unit_and_the_one_in_a_handover_are_confined_alike(tmp_path: Path) -> None:
    lines = [line.partition("=") for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    given = {key: value for key, _, value in lines if key in SANDBOX}
    nothing = Fragment(tmp_path, "", {})
    assert read_settings(given, nothing) == read_settings(SANDBOX, nothing)
