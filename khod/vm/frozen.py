# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is stopped for a handover: its files, which a process of their own keeps when khod-vm and QEMU die.

khod has the files too, but ends its hold of them when it rolls back, and a producer that died cannot be told to take
them back. The keeper is sleep(1) with a descriptor of each file. A note in khod-vm's directory names it, and the next
khod-vm opens the files by its /proc/PID/fd.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from khod import values
from khod.errors import errno_text
from khod.vm.left_process import LeftProcess
from khod.vm.monitor import VmError

STATE, ABOUT = "state", "about"
"""Names of files that are handed over; the others are the guest's RAM, by the names of its memory backends."""
MAGIC = b"QEVM"
"""The first bytes of QEMU's state."""
SPENT = bytes(len(MAGIC))


@dataclass(frozen=True)
class About:
    """What the next khod-vm must know: the command line with the machine type, and whether the guest was running."""

    command: list[str]
    given: list[str]
    """The command of the machine's file, from which that was made."""
    running: bool
    is_memory_apart: bool = True
    """Whether the RAM is in its files alone, and not also in QEMU's state."""
    lag: float | None = None
    """By how many seconds the guest's clock was behind the host's, if that is known."""


@dataclass(frozen=True)
class _KeptFilesNote:
    """Whether the guest ran, and its files: the process that keeps them, and their descriptors there."""

    running: bool
    keeper: LeftProcess
    names: list[str]
    fds: list[int]


class FrozenGuest:
    """The files of a guest from `freeze` to `thaw`; `path` is its note, which is there as long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeper: subprocess.Popen[bytes] | None = None
        self._files: dict[str, int] = {}

    @property
    def is_there(self) -> bool:
        """Whether a guest is stopped for a handover."""
        return self._path.exists()

    @property
    def was_running(self) -> bool:
        """Whether it ran before; VmError if that is not known."""
        return self._read_note().running

    @property
    def files(self) -> Mapping[str, int]:
        """Its state, and what is to be known of it, as they are handed over."""
        return self._files

    @property
    def about(self) -> About | None:
        """What `complete` has noted; None unless all of its state is saved and here."""
        file = self._files.get(ABOUT, -1)
        return read_about(file) if file >= 0 and os.fstat(file).st_size else None

    def begin(self, memory: Mapping[str, int], *, running: bool) -> int:
        """Begin before the guest is stopped; return the empty file for its state. VmError if that cannot be kept."""
        self.release()
        self._files = {name: os.memfd_create(f"khod-{name}", os.MFD_CLOEXEC) for name in (STATE, ABOUT)}
        kept = {**memory, **self._files}
        try:
            self._keeper = subprocess.Popen(
                ["/bin/sleep", "infinity"], stdin=subprocess.DEVNULL, pass_fds=[*kept.values()], process_group=0
            )
            note = _KeptFilesNote(running, LeftProcess.of(self._keeper.pid), [*kept], [*kept.values()])
            aside = self._path.with_suffix(".new")
            aside.write_text(json.dumps(asdict(note)))
            aside.rename(self._path)
        except OSError as error:
            self.release()
            raise VmError(f"its files cannot be kept while it is stopped: {errno_text(error)}") from None
        return self._files[STATE]

    def complete(self, about: About) -> None:
        """Note that the state is saved."""
        os.pwrite(self._files[ABOUT], json.dumps(asdict(about)).encode(), 0)

    def recall(self) -> dict[str, int]:
        """Take up what an earlier khod-vm of this boot has begun; return the files of the RAM, {} if they are lost."""
        memory: dict[str, int] = {}
        with suppress(OSError, VmError):  # the keeper has ended
            note = self._read_note()
            if note.keeper.is_there:
                for name, fd in zip(note.names, note.fds, strict=True):
                    opened = os.open(f"/proc/{note.keeper.pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                    (self._files if name in (STATE, ABOUT) else memory)[name] = opened
        return memory

    def release(self) -> None:
        """End it: the guest continues, or is lost."""
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
            self._keeper = None
        elif self.is_there:
            with suppress(VmError):
                self._read_note().keeper.kill()
        close_files(self._files)
        self._files = {}
        self._path.unlink(missing_ok=True)

    def _read_note(self) -> _KeptFilesNote:
        try:
            return values.decode_value(_KeptFilesNote, json.loads(self._path.read_text()), "frozen")
        except (OSError, ValueError) as error:
            raise VmError(f"{self._path} cannot be read: {error}") from None


def is_spent(state: int) -> bool:
    """Whether a guest has continued from this state, -1 for none: QEMU is its only home since."""
    return state >= 0 and os.pread(state, len(SPENT), 0) == SPENT


def spend_state(state: int) -> None:
    """Note in the state itself, which all who have it see, that its guest continues: no QEMU loads it any more.

    The guest must not continue from it a second time, beside disks and a RAM that are newer.
    """
    if state >= 0 and os.fstat(state).st_size:
        os.pwrite(state, SPENT, 0)


def unspend_state(state: int) -> None:
    """Undo `spend_state`: the guest did not continue."""
    if is_spent(state):
        os.pwrite(state, MAGIC, 0)


def read_about(file: int) -> About:
    """Return what came with a state; VmError where that cannot be read."""
    try:
        found = json.loads(os.pread(file, os.fstat(file).st_size, 0))
        return values.decode_value(About, found, "about", may_lack={"lag"})
    except (OSError, ValueError) as error:
        raise VmError(f"what came with the guest cannot be read: {error}") from None


def close_files(files: Mapping[str, int]) -> None:
    """Close descriptors."""
    for fd in files.values():
        os.close(fd)
