"""The durable record of one handover: written before each step it describes, read at every start.

A write is atomic: a new file, fsync, rename, fsync of the directory. The snapshots of state trees
lie beside it; they are made durable by the sync before the jump, and worthless without one.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from khod import wire
from khod.errors import RecordError, errno_text
from khod.model import Generation, Kept, Phase, Step, StepTiming, Verdict
from khod.snapshots import Snapshots

VERSION = 1
ADDED: dict[str, list[object]] = {"producers": []}
"""Fields a record of this version may lack: an earlier khod wrote it."""

FILE = "handover.json"
RESERVE = 16 << 20
"""Bytes that must be free before the kernel is touched: the record, and a tree of v3's default dt_max."""


@dataclass(frozen=True)
class Owner:
    """Whose a producer is: what it left is given back to nobody else. `unit` is systemd's, "" where it has none."""

    uid: int
    unit: str


@dataclass(frozen=True)
class Process:
    """One process for good: `started` is field 22 of /proc/PID/stat, so that a number used again is another."""

    pid: int
    started: int


@dataclass(frozen=True)
class Holder:
    """A producer of this handover: what it was told last, and what is needed to tell it more.

    `timeout`, `after`, `before` and `devices` stand here for peers alone, of which no file tells.
    """

    name: str
    kind: str
    told: str = ""
    note: str = ""
    timeout: float = 0.0
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    owner: Owner | None = None
    process: Process | None = None
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Record:
    """What khod must know after it died, or after the jump. Times as in `khod.model`."""

    version: int = VERSION
    phase: Phase = Phase.idle
    done: tuple[Step, ...] = ()
    run: str = ""
    boot_id: str = ""
    release: str = ""
    generation: Generation = Generation.none
    handovers: int = 0
    previous_release: str = ""
    window_began_at: float = 0.0
    blackout_seconds: float | None = None
    timings: tuple[StepTiming, ...] = ()
    last_error: str = ""
    verdict: Verdict | None = None
    suspect: str = ""
    """Why the state of the boot `boot_id` may not be whole: an abort that made the kernel forget."""
    producers: tuple[Holder, ...] = ()
    failed_activations: int = 0
    """Failed activations in the boot `boot_id`: each may leak up to dt_max of kernel memory."""


def encode(record: Record) -> bytes:
    """Render the record as JSON, a field or a producer on each line: an operator reads it too."""
    fields = [f'"{name}": {_line(value)}' for name, value in wire.plain(record).items()]
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _line(value: object) -> str:
    if isinstance(value, tuple) and value:
        return "[\n  " + ",\n  ".join(map(_line, value)) + "\n]"
    return json.dumps(value, default=wire.plain)


def decode(raw: bytes, where: str = "") -> Record:
    """Read a record; RecordError that says what is wrong with it."""
    remedy = "Look at it, then run: khoctl abort --force"
    try:
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise TypeError("it is no JSON object")
        version = values.get("version")
        if isinstance(version, int) and version > VERSION:
            raise RecordError(
                f"The record has version {version}, this khod knows {VERSION}: a newer khod wrote it",
                where=where,
                remedy="Install that khod again, or: khoctl abort --force",
            )
        if version != VERSION:
            raise ValueError(f"its version is {version!r}")
        return wire.decode(Record, ADDED | values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RecordError(f"The record cannot be understood: {error!r}", where=where, remedy=remedy) from None


@dataclass(frozen=True)
class Store:
    """The directory the record lives in. Every method raises RecordError with path and cause."""

    directory: Path

    @property
    def path(self) -> Path:
        """The record itself."""
        return self.directory / FILE

    def read(self) -> Record | None:
        """The record, None where there was never one."""
        try:
            return decode(self.path.read_bytes(), str(self.path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"The record cannot be read: {errno_text(error)}", where=str(self.path)) from error

    def write(self, record: Record, *, durable: bool = True) -> None:
        """Replace the record; without `durable` it survives khod, and not a loss of power."""
        try:
            new = self.directory / f"{FILE}.new"
            with open(new, "wb") as file:
                file.write(encode(record))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            new.rename(self.path)
            if not durable:
                return
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _unwritable(error, self.path) from error

    @property
    def snapshots(self) -> Snapshots:
        """The state trees that left."""
        return Snapshots(self.directory / "snapshots")

    def free(self) -> int:
        """Bytes that may still be written here."""
        try:
            stat = os.statvfs(self.directory)
        except OSError as error:
            raise _unwritable(error, self.directory) from error
        return stat.f_bavail * stat.f_frsize


def _unwritable(error: OSError, path: Path) -> RecordError:
    return RecordError(
        f"The record cannot be written: {errno_text(error)}",
        where=str(path),
        remedy="Make room or mount the file system writable; the kernel was not touched since.",
    )
