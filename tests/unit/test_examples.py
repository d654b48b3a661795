# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples as an operator gets them: the samples load, the pool passes the barrier, the store keeps its data."""

import importlib.machinery
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest

from khod.producer import Producer, Step
from khod.producers import directory
from khod.producers.children import Children
from khod.producers.hooks import Hook
from khod.producers.qemu import Qemu
from khod.producers.unit import Unit
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, call, until

EXAMPLES = REPOSITORY / "packaging/examples"
SAMPLES = sorted((REPOSITORY / "etc/kho/producers.d").glob("*.toml.sample"))
STORE = """
import runpy, sys
from khod import wire
wire.SOCKET = sys.argv.pop(1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs an example beside a khod whose socket is elsewhere."""


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Khod]:
    made = Khod(tmp_path)
    yield made
    made.close()


# What stands in /etc/kho/producers.d


@pytest.mark.parametrize("everything", [False, True], ids=["as it is", "with every key"])
def test_every_sample_is_a_producer_of_its_kind(tmp_path: Path, everything: bool) -> None:
    installed = tmp_path / directory.DIRECTORY
    installed.mkdir(parents=True)
    for sample in SAMPLES:
        text = sample.read_text()
        for key in (*directory.VERBS, "how", "timeout", "after", "before", "devices") if everything else ():
            text = text.replace(f"\n#{key} = ", f"\n{key} = ")
        (installed / sample.name.removesuffix(".sample")).write_text(text)
    kinds = {producer.name: type(producer) for producer in directory.load_directory(tmp_path, Children())}
    assert kinds == {"example": Hook, "unit": Unit, "vm": Qemu}


def test_a_sample_is_no_producer_before_it_is_copied(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/kho").symlink_to(REPOSITORY / "etc/kho")
    assert directory.load_directory(tmp_path, Children()) == []


# The pool: a hook


def pool(khod: Khod, commands: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Install the pool with the file its own comment gives; the directory it works in.

    A hook's environment is clean, so that goes in through env(1). `commands` are another hook's, told after it.
    """
    state, script = khod.directory / "pool", EXAMPLES / "pool"
    lines = [line.removeprefix("#     ") for line in script.read_text().splitlines() if line.startswith("#     ")]
    text = "\n".join(lines).replace('"/usr/local/lib/pool"', f'"env", "POOL={state}", "{script}"')
    installed = khod.directory / "root" / directory.DIRECTORY
    installed.mkdir(parents=True)
    (installed / "pool.toml").write_text(text)
    if commands:
        words = [f'{verb} = ["sh", "-c", "{command}"]\n' for verb, command in commands.items()]
        (installed / "vmm.toml").write_text("".join([*words, 'after = ["pool"]\n']))
    state.mkdir()
    return state


def images(khod: Khod) -> list[str]:
    """The options that name a kernel and an initrd."""
    (khod.directory / "vmlinuz").write_bytes(bzimage())
    (khod.directory / "initrd").write_bytes(CPIO)
    return [f"--image={khod.directory / 'vmlinuz'}", f"--initrd={khod.directory / 'initrd'}"]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_pool_is_drained_and_closed_and_an_abort_puts_it_back(khod: Khod) -> None:
    state = pool(khod)
    assert khod.khoctl("activate").code == 0
    assert names(state) == {"drained", "closed"}
    assert (state / "drained").read_text().strip() == khod.record.run
    assert khod.khoctl("abort").code == 0
    assert names(state) == set()


def test_the_pool_works_again_in_the_next_kernel(khod: Khod) -> None:
    state = pool(khod)
    assert khod.khoctl("kexec", *images(khod)).code == 0
    khod.word("READY=1")
    verified = khod.khoctl("verify", "--json")
    assert (verified.code, verified.json["phase"]) == (0, "verified"), verified
    assert "pool" in verified.json["verdict"]["arrived"]
    assert names(state) == set(), "neither drained nor closed, or it would stand still from here on"


def test_a_degraded_pool_vetoes_and_the_next_handover_finds_it_as_it_was(khod: Khod) -> None:
    state = pool(khod)
    (state / "degraded").touch()
    refused = khod.khoctl("activate")
    assert refused.code == 3
    assert "pool" in refused.err
    assert "the pool is degraded, and draining it would lose work" in refused.err
    assert (khod.active, khod.loaded, names(state)) == (False, False, {"degraded"})
    (state / "degraded").unlink()
    assert khod.khoctl("activate").code == 0
    assert names(state) == {"drained", "closed"}


def test_a_pool_that_is_closed_is_opened_and_filled_when_another_producer_vetoes(khod: Khod) -> None:
    said = khod.directory / "said"
    state = pool(khod, {"freeze": f"ls {shlex.quote(str(khod.directory / 'pool'))} > {said}; echo busy >&2; exit 1"})
    refused = khod.khoctl("kexec", *images(khod))
    assert refused.code == 3
    assert "vmm" in refused.err
    assert "busy" in refused.err
    assert said.read_text().split() == ["closed", "drained"], "it was told before"
    assert names(state) == set()
    assert (khod.active, khod.loaded) == (False, False)


def test_the_pool_alone_is_tested_and_the_kernel_left_alone(khod: Khod) -> None:
    state = pool(khod, {"prepare": "echo nobody asked me >&2; exit 1"})
    tested = khod.khoctl("producers", "test", "pool")
    assert tested.code == 0, tested
    assert names(state) == set()
    assert not khod.active


@pytest.mark.parametrize("word", ["drain", "fill", "close", "open"])
def test_the_pool_takes_each_word_at_any_time_and_twice(tmp_path: Path, word: str) -> None:
    """Undo comes for what was never done, and a verb may come again after a khod that died."""
    environment = {**os.environ, "POOL": str(tmp_path / "pool"), "KHO_RUN": "run-1"}
    for _time in range(2):
        subprocess.run([EXAMPLES / "pool", word], env=environment, check=True, timeout=DEADLINE)


def test_the_pool_refuses_a_word_it_does_not_know(tmp_path: Path) -> None:
    environment = {**os.environ, "POOL": str(tmp_path / "pool"), "KHO_RUN": "run-1"}
    ended = subprocess.run(
        [EXAMPLES / "pool", "paint"], env=environment, check=False, capture_output=True, text=True, timeout=DEADLINE
    )
    assert ended.returncode != 0
    assert "paint" in ended.stderr.splitlines()[-1]


# The key-value store: a producer in Python


class Store:
    """One kv-store that has said that it is ready."""

    def __init__(self, path: Path, errors: Path) -> None:
        self._path, self._errors = path, errors

    def ask(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(self._path))
            lines = client.makefile("rw")
            lines.write(f"{line}\n")
            lines.flush()
            return lines.readline().rstrip("\n")

    @property
    def said(self) -> str:
        """Its standard error."""
        return self._errors.read_text()


@contextmanager
def store(tmp_path: Path, khods_socket: Path) -> Iterator[Store]:
    """Run the example until the end, with a store of one mebibyte."""
    notify, path, errors = (tmp_path / f"store-{name}" for name in ("notify", "socket", "errors"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening, errors.open("wb") as written:
        listening.bind(str(notify))
        listening.settimeout(DEADLINE)
        process = subprocess.Popen(
            [sys.executable, "-c", STORE, khods_socket, EXAMPLES / "kv-store", path, "1"],
            env={**os.environ, "NOTIFY_SOCKET": str(notify), "PYTHONPATH": str(REPOSITORY)},
            stderr=written,
        )
        try:
            assert listening.recv(4096) == b"READY=1"
            yield Store(path, errors)
        finally:
            process.kill()
            process.wait(DEADLINE)


def test_the_store_works_without_khod_and_says_what_that_means(tmp_path: Path) -> None:
    with store(tmp_path, tmp_path / "nothing") as kept:
        assert kept.ask("GET a") == "none"
        assert kept.ask("SET a one two") == "ok"
        assert kept.ask("GET a") == "value one two"
        assert kept.ask(f"SET b {'x' * (1 << 20)}") == "full"
        assert kept.ask("COUNT") == "count 1"
        assert "no handover will keep this data" in kept.said
        assert str(tmp_path / "nothing") in kept.said


def test_on_a_kernel_without_luo_the_store_refuses_and_goes_on_working(khod: Khod, tmp_path: Path) -> None:
    """v3 came years before LUO: its data would be lost, and that is no reason to freeze it."""
    with store(tmp_path, khod.socket) as kept:
        assert kept.ask("SET a before") == "ok"
        listed = khod.khoctl("producers", "--json").json
        assert [(found["name"], found["kind"]) for found in listed] == [("kv-store", "varlink")]
        refused = khod.khoctl("kexec", *images(khod))
        assert refused.code == 4, refused
        sentence = refused.err.splitlines()[-1]
        assert "Live Update Orchestrator" in sentence
        assert "/dev/liveupdate" in sentence
        assert "kv-store" in sentence, "who needs it: there may be others that do not"
        assert (khod.active, khod.loaded) == (False, False)
        assert kept.ask("SET a after") == "ok"
        assert kept.ask("GET a") == "value after"
        assert khod.khoctl("status", "--json").json["phase"] == "idle"


def test_a_store_that_is_gone_holds_nobody_up(khod: Khod, tmp_path: Path) -> None:
    with store(tmp_path, khod.socket):
        assert khod.khoctl("activate").code == 4
    until(lambda: khod.ask("Producers")["producers"] == [], khod.process)
    assert khod.khoctl("activate").code == 0


@pytest.fixture
def example() -> ModuleType:
    """Import the store; a file without a suffix wants a loader of its own."""
    loader = importlib.machinery.SourceFileLoader("kv_store", str(EXAMPLES / "kv-store"))
    spec = importlib.util.spec_from_loader("kv_store", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(made)
    return made


def test_whoever_gets_the_memfd_has_the_data(example: ModuleType) -> None:
    """What `restore` does in the next kernel, where nothing of the old process is left but the file."""
    before = example.Store.empty(1 << 16)
    wanted = {f"key-{number}": "ü" * number for number in range(50)} | {"": "empty key", "key-7": "the newer one"}
    for number in range(50):
        assert before.set(f"key-{number}", "ü" * number)
    assert before.set("", "empty key")
    assert before.set("key-7", "the newer one")
    after = example.Store(os.dup(before.memfd))
    assert {key: after.get(key) for key in wanted} == wanted
    assert after.set("new", "value")
    assert example.Store(os.dup(after.memfd)).get("new") == "value"


def test_a_record_counts_when_it_is_whole(example: ModuleType) -> None:
    kept = example.Store.empty(1 << 12)
    assert kept.set("a", "1")
    end = kept.end
    os.pwrite(kept.memfd, b"\xff" * 100, end)  # a write that the jump cut short
    assert example.Store(kept.memfd).index.keys() == {"a"}
    assert not kept.set("b", "x" * (1 << 12))
    assert (kept.end, kept.get("b")) == (end, None), "what does not fit changes nothing"


def test_a_frozen_store_reads_and_does_not_write(example: ModuleType) -> None:
    kept = example.Store.empty(1 << 12)
    assert kept.set("a", "1")
    before = os.pread(kept.memfd, 1 << 12, 0)
    kept.writing.acquire()
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(kept.set, "b", "2")
        assert kept.get("a") == "1"
        assert not writing.done()
        assert os.pread(kept.memfd, 1 << 12, 0) == before
        kept.writing.release()
        assert writing.result(DEADLINE)
    assert kept.get("b") == "2"


# What the store rests on: khod.producer


def serve(client: socket.socket, said: Callable[[str], None]) -> None:
    """Say yes to everything, until khod hangs up: a producer whose process the jump ends."""
    answer: dict[str, Any] = {}
    while command := call(client, "io.kho.Producer.Next", **answer).get("parameters"):
        said(command["verb"])
        answer = {"serial": command["serial"], "answer": "ready"}


def jump(khod: Khod) -> list[str]:
    """Hand over with one producer, `cache`, whose process the jump ends; what it was told. The next kernel runs."""
    told: list[str] = []
    with khod.connect() as before, ThreadPoolExecutor() as threads:
        call(before, "io.kho.Producer.Register", name="cache", version=1)
        serving = threads.submit(serve, before, told.append)
        assert khod.khoctl("kexec", *images(khod)).code == 0
        serving.result(DEADLINE)
    khod.word("READY=1")
    return told


def test_start_returns_when_restore_has_been_called(khod: Khod) -> None:
    """A producer that begins empty before it has what it left loses it."""
    assert jump(khod) == ["prepare", "freeze"]
    order: list[str] = []
    finished = threading.Event()

    def restore(step: Step) -> None:
        order.append(step.verb)

    after = Producer("cache", restore=restore, finish=lambda _step: finished.set(), socket=khod.socket)
    after.start()
    order.append("started")
    try:
        assert finished.wait(DEADLINE)
        assert order == ["restore", "started"]
        verified = khod.khoctl("verify", "--json")
        assert (verified.code, verified.json["phase"]) == (0, "verified")
        assert "cache" in verified.json["verdict"]["arrived"]
    finally:
        after.stop()


def test_after_a_cold_boot_everyone_starts_from_scratch(khod: Khod) -> None:
    khod.kernel.set_fault("cold", True)
    jump(khod)
    assert khod.khoctl("verify", "--json").json["phase"] == "cold_boot"
    assert khod.khoctl("check").code == 0, "nobody waits for what is gone"
    told: list[str] = []

    def note(step: Step) -> None:
        told.append(step.verb)

    after = Producer("cache", prepare=note, freeze=note, restore=note, finish=note, socket=khod.socket)
    after.start()
    try:
        assert khod.khoctl("activate").code == 0
        assert told == ["prepare", "freeze"]
    finally:
        after.stop()


def test_the_ten_lines_of_the_manual_page_are_a_producer(khod: Khod, tmp_path: Path) -> None:
    text = (REPOSITORY / "packaging/man/kho-producers.7").read_text()
    code = text.partition("\n.EX\n")[2].partition(".EE\n")[0]
    assert 0 < len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "ten.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-c", STORE, khod.socket, tmp_path / "ten.py"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        until(lambda: bool(khod.ask("Producers")["producers"]), process)
        assert [found["name"] for found in khod.ask("Producers")["producers"]] == ["cache"]
        refused = khod.khoctl("activate")
        assert refused.code == 4, "it hands a file over, and there is no LUO in v3"
    finally:
        process.kill()
        process.wait(DEADLINE)
