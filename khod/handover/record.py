# SPDX-License-Identifier: LGPL-2.1-or-later
"""The durable record of one handover: written before each step it describes, read at every start.

A write is atomic: a new file, fsync, rename, fsync of the directory. The snapshots of state trees
lie beside it; they are made durable by the sync before the jump, and worthless without one.
"""

import errno
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from khod import wire
from khod.errors import RecordError, errno_text
from khod.handover.snapshots import Snapshots
from khod.model import (
    Begun,
    Finding,
    Generation,
    Kept,
    LuoSession,
    NotUndone,
    Observed,
    Phase,
    Step,
    StepTiming,
    Verdict,
)

VERSION = 1
ADDED_FIELDS = frozenset(
    {"producers", "restores", "not_undone", "interrupted", "outcome", "arrived_run", "claims", "findings", "begun"}
    | {"unknown", "sessions", "sessions_unseen", "at_once", "doubt", "source", "subject", "severity"}
)
"""Fields a record of this version may lack: an earlier khod wrote it."""

FILE_NAME = "handover.json"
DEPARTURE = "departure.json"
UNREADABLE = "handover.json.unreadable"
RESERVED_BYTES = 16 << 20
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
class ProducerRecord:
    """A producer of this handover: what it was told last, and what is needed to tell it more.

    `restores` says whether it has anything to do in the next kernel: there it counts as missing until it has. None
    where an earlier khod did not record that.
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
    restores: bool | None = None


@dataclass(frozen=True)
class Record:
    """What khod must know after it died, or after the jump. Times as in `khod.model`.

    What is under way (`phase` to `producers`) and what this boot came to (`outcome` to `claims`) are two subjects:
    a handover that begins, ends or is rolled back changes nothing of the second.
    """

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
    """When the first producer was told `freeze`; 0 before."""
    blackout_seconds: float | None = None
    """From there to the last that answered `finish` in this boot; None while nobody has, or where it is not known."""
    timings: tuple[StepTiming, ...] = ()
    last_error: str = ""
    verdict: Verdict | None = None
    suspect: str = ""
    """Why the state of the boot `boot_id` may not be whole: an abort that made the kernel forget."""
    producers: tuple[ProducerRecord, ...] = ()
    """Who takes part in the handover `run`."""
    failed_activations: int = 0
    """Failed activations in the boot `boot_id`: each may leak up to dt_max of kernel memory."""
    not_undone: tuple[NotUndone, ...] = ()
    """What the last rollback could not put back."""
    interrupted: str = ""
    """Why a handover was rolled back when khod was stopped: if the next khod starts in another boot, the host went
    down in the middle of it."""
    outcome: Phase = Phase.idle
    """What the handover into the boot `boot_id` came to: verified, degraded, cold_boot; idle where there was none."""
    arrived_run: str = ""
    """The handover this boot was reached by: its sessions are the previous kernel's, and freed by no rollback."""
    sessions: tuple[LuoSession, ...] = ()
    """LUO sessions of other processes as they were before the jump of the handover `run`."""
    sessions_unseen: str = ""
    """Why there may have been more, "" where there were not."""
    at_once: bool = False
    """Whether the handover `run` jumps at once: with nothing stopped before, so that no session is lost."""
    doubt: str = ""
    """Why what arrived in this boot cannot be all that the producers had, "" where nothing speaks against it."""
    claims: tuple[ProducerRecord, ...] = ()
    """What was left by the previous kernel's producers and not taken back yet."""
    begun: Begun = field(default_factory=Begun)

    def begin_run(self, run: str, observed: Observed, generation: Generation, by: str = "") -> "Record":
        """Give the record of a new handover in this boot; what this boot came to stays."""
        return replace(
            self,
            phase=self.outcome,
            done=(),
            run=run,
            boot_id=observed.boot_id,
            release=observed.release,
            generation=generation,
            window_began_at=0.0,
            timings=(),
            last_error="",
            producers=(),
            not_undone=(),
            interrupted="",
            begun=Begun(time.time(), by),
            sessions=(),
            sessions_unseen="",
            at_once=False,
        )


def encode_record(record: Record) -> bytes:
    """Render the record as JSON, a field or a producer on each line: an operator reads it too."""
    fields = [f'"{name}": {_encode_line(value)}' for name, value in wire.encode_value(record).items()]
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _encode_line(value: object) -> str:
    if isinstance(value, tuple) and value:
        return "[\n  " + ",\n  ".join(map(_encode_line, value)) + "\n]"
    return json.dumps(value, default=wire.encode_value)


def decode_record(raw: bytes, where: str = "") -> Record:
    """Read a record; RecordError that says what is wrong with it."""
    remedy = "Look at it, then run: `Abort(force)`"
    try:
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
        version = values.get("version")
        if isinstance(version, int) and version > VERSION:
            raise RecordError(
                f"The record has version {version}, this khod knows {VERSION}: a newer khod wrote it",
                where=where,
                remedy="Install that khod again, or: `Abort(force)`",
            )
        if version != VERSION:
            raise ValueError(f"its version is {version!r}")
        record = wire.decode_value(Record, values, may_lack=ADDED_FIELDS)
        return _add_findings(record) if "findings" not in (values["verdict"] or ["findings"]) else record
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RecordError(f"The record cannot be understood: {error}", where=where, remedy=remedy) from None


def _add_findings(record: Record) -> Record:
    """The record with the findings that an earlier khod left out: it recorded names and one sentence.

    The sentence is lost with the next finding, so it stays one itself, but where producers alone are missing: each of
    them takes its own finding away when it has its state again.
    """
    verdict = record.verdict
    if verdict is None or not verdict.reason:
        return record
    waiting = {holder.name for holder in record.claims or record.producers}
    if verdict.missing and not verdict.changed and waiting.issuperset(verdict.missing):
        findings = [Finding.of_producer(name, "did not take back what it left") for name in verdict.missing]
    else:
        findings = [Finding.of_khod(verdict.reason)]
    return replace(record, verdict=replace(verdict, findings=findings))


@dataclass(frozen=True)
class Store:
    """The directory the record lives in. Every method raises RecordError with path and cause."""

    directory: Path

    @property
    def record_path(self) -> Path:
        """The record itself."""
        return self.directory / FILE_NAME

    def read(self) -> Record | None:
        """The record, None where there was never one."""
        try:
            return decode_record(self.record_path.read_bytes(), str(self.record_path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"The record cannot be read: {errno_text(error)}", where=str(self.record_path)) from error

    def write(self, record: Record, *, durable: bool = True) -> None:
        """Replace the record; without `durable` it survives khod, and not a loss of power."""
        self._replace_file(FILE_NAME, record, durable=durable)

    def write_departure(self, record: Record) -> None:
        """Leave a copy of the record with the jump; both executors sync it to the disk."""
        self._replace_file(DEPARTURE, record, durable=False)

    def _replace_file(self, name: str, record: Record, *, durable: bool) -> None:
        """Write a file anew: all of it or nothing."""
        try:
            new = self.directory / f"{name}.new"
            with open(new, "wb") as file:
                file.write(encode_record(record))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            new.rename(self.directory / name)
            if not durable:
                return
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _unwritable_error(error, self.directory / name) from error

    def read_departure(self) -> Record | None:
        """The copy that was left with the last jump; None where there is none that can be read."""
        try:
            return decode_record((self.directory / DEPARTURE).read_bytes(), DEPARTURE)
        except (OSError, RecordError):
            return None

    def remove_departure(self) -> None:
        """Remove the copy that was left with the last jump, where there is one."""
        try:
            (self.directory / DEPARTURE).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable_error(error, self.directory / DEPARTURE) from error

    def set_aside(self) -> Path | None:
        """Keep a record that cannot be read under another name: another is written in its place. Where it is then."""
        try:
            self.read()
        except RecordError:
            pass
        else:
            return None
        try:
            return self.record_path.rename(self.directory / UNREADABLE)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unwritable_error(error, self.directory / UNREADABLE) from error

    @property
    def snapshots(self) -> Snapshots:
        """The state trees that left."""
        return Snapshots(self.directory / "snapshots")

    def free_bytes(self) -> int:
        """Bytes that may still be written here; RecordError where the file system is mounted read-only."""
        try:
            stat = os.statvfs(self.directory)
            if not os.access(self.directory, os.W_OK):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        except OSError as error:
            raise _unwritable_error(error, self.directory) from error
        return stat.f_bavail * stat.f_frsize


def _unwritable_error(error: OSError, path: Path) -> RecordError:
    return RecordError(
        f"The record cannot be written: {errno_text(error)}",
        where=str(path),
        remedy="Free some space or mount the file system writable; the kernel was not touched since.",
    )
