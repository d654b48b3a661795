# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a stopped guest: they outlive khod-vm, and no guest continues from its state twice."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from khod.vm import supervisor
from khod.vm.frozen import (
    ABOUT,
    MAGIC,
    STATE,
    About,
    FrozenGuest,
    close_files,
    is_spent,
    read_about,
    spend_state,
    unspend_state,
)
from khod.vm.left_process import LeftProcess
from khod.vm.monitor import VmError
from khod.vm.process import create_memory
from tests.unit.khods import DEADLINE, REPOSITORY

QEMU = About(["qemu", "-M", "pc-q35-7.2"], ["qemu"], True, lag=1.5)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[FrozenGuest]:
    made = FrozenGuest(tmp_path / "frozen")
    yield made
    made.release()


@pytest.fixture
def memory() -> Iterator[dict[str, int]]:
    made = {"khod-ram": create_memory(1 << 20)}
    yield made
    close_files(made)


def children() -> set[str]:
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_khod_vm_with_many_descriptors_ends_what_it_left() -> None:
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        while (fd := os.open("/dev/null", os.O_RDONLY)) < 1024:  # select(2) takes none above
            stack.callback(os.close, fd)
        stack.callback(os.close, fd)
        left = subprocess.Popen(["sleep", "infinity"])
        LeftProcess.of(left.pid).kill()
        assert left.wait(DEADLINE) == -signal.SIGKILL


def test_the_files_outlive_the_khod_vm_that_had_them(tmp_path: Path, memory: dict[str, int]) -> None:
    """They are the same files: what one writes, the other reads."""
    script = f"""
from pathlib import Path
from khod.vm.frozen import About, FrozenGuest
import os
guest = FrozenGuest(Path({str(tmp_path / "frozen")!r}))
state = guest.begin({{"khod-ram": {memory["khod-ram"]}}}, running=True)
os.write(state, b"QEVM and more")
guest.complete(About(["qemu", "-M", "pc-q35-7.2"], ["qemu"], True, lag=1.5))
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, timeout=60, pass_fds=[memory["khod-ram"]]
    )
    found = FrozenGuest(tmp_path / "frozen")
    recalled = found.recall()
    try:
        assert (found.is_there, found.was_running, found.about) == (True, True, QEMU)
        assert os.pread(found.files[STATE], 100, 0) == b"QEVM and more"
        assert os.path.sameopenfile(recalled["khod-ram"], memory["khod-ram"])
    finally:
        close_files(recalled)
        found.release()
    assert not found.is_there
    assert FrozenGuest(tmp_path / "frozen").recall() == {}


def test_files_whose_keeper_has_ended_are_lost(tmp_path: Path, frozen: FrozenGuest, memory: dict[str, int]) -> None:
    before = children()
    frozen.begin(memory, running=False)
    (keeper,) = children() - before
    os.kill(int(keeper), 9)
    os.waitpid(int(keeper), 0)
    found = FrozenGuest(tmp_path / "frozen")
    assert found.recall() == {}
    assert (found.is_there, found.was_running, found.about) == (True, False, None)


def test_a_guest_whose_note_cannot_be_written_is_not_stopped(tmp_path: Path, memory: dict[str, int]) -> None:
    """As on a full or read-only file system; no process is left that holds the RAM."""
    before = children()
    with pytest.raises(VmError, match=r"cannot be kept while it is stopped: ENOENT"):
        FrozenGuest(tmp_path / "nowhere/frozen").begin(memory, running=True)
    assert children() == before


def test_a_state_is_complete_when_it_is_noted(frozen: FrozenGuest, memory: dict[str, int]) -> None:
    frozen.begin(memory, running=True)
    assert frozen.about is None
    frozen.complete(QEMU)
    assert frozen.about == QEMU


def test_a_command_line_of_any_length_comes_back(frozen: FrozenGuest, memory: dict[str, int]) -> None:
    words = ["-append" * 15_000] * 10
    frozen.begin(memory, running=True)
    frozen.complete(replace(QEMU, command=words, given=words))
    assert read_about(frozen.files[ABOUT]).command == words


def test_a_state_is_spent_in_all_its_descriptors(frozen: FrozenGuest, memory: dict[str, int]) -> None:
    state = frozen.begin(memory, running=True)
    spend_state(state)
    assert not is_spent(state), "an empty one is none"
    spend_state(-1)
    assert not is_spent(-1)
    os.write(state, MAGIC + b"more")
    other = os.dup(state)
    spend_state(state)
    assert is_spent(other)
    unspend_state(other)
    assert os.pread(state, 100, 0) == MAGIC + b"more"
    os.close(other)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"running": true, "keeper": 1, "names": [], "fds": []}', "\0"])
def test_a_note_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "frozen").write_text(text)
    found = FrozenGuest(tmp_path / "frozen")
    assert found.recall() == {}
    with pytest.raises(VmError, match=r"frozen cannot be read: "):
        _ = found.was_running


# khod-vm's own directory


def end_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: Path, words: Sequence[str] = ()) -> int:
    """Run khod-vm's main function with a machine; its exit code."""
    path = tmp_path / "etc/kho/vm.d/one.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('command = ["qemu", "-m", "1G"]')
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(directory))
    monkeypatch.setattr(sys, "argv", ["khod-vm", "one", f"--root={tmp_path}", *words])
    return supervisor.main()


def test_a_directory_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert end_with(monkeypatch, tmp_path, Path("/proc/khod-vm/one")) == 1
    assert caplog.messages == ["/proc/khod-vm: ENOENT (No such file or directory)"]


def test_a_second_khod_vm_of_one_machine_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with supervisor._hold_directory(tmp_path):
        assert end_with(monkeypatch, tmp_path, tmp_path) == 1
    assert caplog.messages == [f"another khod-vm has {tmp_path}: end it first"]
