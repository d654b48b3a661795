# SPDX-License-Identifier: LGPL-2.1-or-later
"""The durable record of one handover: written before each step it describes, read at every start.

A write is atomic: a new file, fsync, rename, fsync of the directory. The snapshots of state trees lie beside the
record. They become durable only with the sync before the jump: without a jump they are not needed.
"""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import RecordError, errno_text
from khod.handover.directory import FILE_NAME, VERSION
from khod.model import (
    NO_TERMS,
    Begun,
    ColdBoot,
    Finding,
    Generation,
    Kept,
    LuoSession,
    NotUndone,
    Observed,
    Phase,
    Step,
    StepTiming,
    Terms,
    Verdict,
)
from khod.values import UnknownField, decode_value, encode_value

if TYPE_CHECKING:
    from khod.handover import snapshots
else:
    snapshots = defer_module("khod.handover.snapshots")

ADDED_FIELDS = frozenset(
    {"producers", "restores", "not_undone", "interrupted", "outcome", "arrived_run", "claims", "findings", "begun"}
    | {"unknown", "sessions", "sessions_unseen", "at_once", "doubt", "source", "subject", "severity", "checks"}
    | {"kernel_release", "kernel_banner", "spot"}
    | {"cold_boot", "watchdog", "blackout_error_seconds", "is_image_suspect", "quiesced", "shown_kind"}
    | {"terms", "arrived_terms", "tolerated", "profile", "rank"}
)
"""Fields that a record of this version may lack, because an earlier khod wrote it."""

DEPARTURE = "departure.json"
UNREADABLE = "handover.json.unreadable"
NEWER_REMEDY = "Install that khod again, or: `Abort(force)`"
RESERVED_BYTES = 16 << 20
"""Bytes that must be free before the kernel is touched: for the record, and for a tree of v3's default dt_max."""


@dataclass(frozen=True)
class Owner:
    """The owner of a producer; what it left is returned only to the same owner. `unit` is its systemd unit, or ""."""

    uid: int
    unit: str


@dataclass(frozen=True)
class Process:
    """One process, also after its number is reused: `started` is field 22 of /proc/PID/stat."""

    pid: int
    started: int


@dataclass(frozen=True)
class ProducerRecord:
    """A producer of this handover: the last verb sent to it, and what is needed to send it more.

    `restores` says whether it has something to restore in the next kernel, where it counts as missing until it has done
    so; None if an earlier khod did not record that. `timeout`, `after`, `before`, `devices` and `shown_kind`, the kind
    that it has named itself, are set only for peers, which have no file.
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
    shown_kind: str = ""
    rank: int = 0
    """Its rank in the order: those of the ranks before it are told before."""


@dataclass(frozen=True)
class Record:
    """What khod must know after it died, or after the jump. Times are as in `khod.model`.

    The handover `run` and the outcome of this boot are two subjects. A handover that begins, ends or is rolled back
    does not change `verdict`, `outcome`, `arrived_run`, `doubt` and `claims`; `begin_run` resets what is about the
    handover.
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
    """When `freeze` was sent to the first producer; 0 before."""
    blackout_seconds: float | None = None
    """From then to the last answer to `finish` in this boot; None before an answer, or if it is not known."""
    blackout_error_seconds: float = 1.0
    """The maximum error of that: of the wall clock, until the timeline of the run knows better."""
    timings: tuple[StepTiming, ...] = ()
    last_error: str = ""
    verdict: Verdict | None = None
    suspect: str = ""
    """Why the state in the boot `boot_id` may be incomplete: an abort made the kernel forget."""
    producers: tuple[ProducerRecord, ...] = ()
    """The producers that take part in the handover `run`."""
    failed_activations: int = 0
    """Failed activations in the boot `boot_id`: each may leak up to dt_max of kernel memory."""
    not_undone: tuple[NotUndone, ...] = ()
    """What the last rollback could not undo."""
    interrupted: str = ""
    """Why a handover was rolled back when khod was stopped.

    If the next khod starts in another boot, the host went down during that handover.
    """
    outcome: Phase = Phase.idle
    """The result of the handover into the boot `boot_id`: verified, degraded, cold_boot; idle without one."""
    arrived_run: str = ""
    """The handover that reached this boot; its sessions are the previous kernel's, and no rollback frees them."""
    sessions: tuple[LuoSession, ...] = ()
    """LUO sessions of other processes, as they were before the jump of the handover `run`."""
    sessions_unseen: str = ""
    """Why there may have been more, "" if there were no more."""
    at_once: bool = False
    """Whether the handover `run` jumps at once: nothing is stopped before, so no session is lost."""
    doubt: str = ""
    """Why what arrived in this boot cannot be all of the producers' state, "" without such a reason."""
    claims: tuple[ProducerRecord, ...] = ()
    """What producers left in the previous kernel and have not taken back yet."""
    begun: Begun = field(default_factory=Begun)
    cold_boot: ColdBoot | None = None
    """What is known of the cold boot that this boot is; None if it is none. A khod completes it after its start."""
    watchdog: str = ""
    """The watchdog that was armed for the handover `run`, and is to be disarmed; "" for none."""

    quiesced: tuple[str, ...] = ()
    """The units that the step quiesce of the handover `run` stops, in the order in which they are started again."""
    terms: Terms = NO_TERMS
    """The terms of the handover `run`."""
    arrived_terms: Terms = NO_TERMS
    """The terms of the handover `arrived_run`, by which this boot is verified."""

    def begin_run(
        self, run: str, observed: Observed, generation: Generation, by: str = "", terms: Terms = NO_TERMS
    ) -> Record:
        """Return the record of a new handover in this boot; the outcome of this boot stays."""
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
            begun=Begun(time.time(), by, profile=terms.profile or ""),
            terms=terms,
            sessions=(),
            sessions_unseen="",
            at_once=False,
            quiesced=(),
        )


def encode_record(record: Record) -> bytes:
    """Return the record as JSON, one line for each field or producer, because operators read it too."""
    fields = [f'"{name}": {_encode_line(value)}' for name, value in encode_value(record).items()]
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _encode_line(value: object) -> str:
    if isinstance(value, tuple) and value:
        return "[\n  " + ",\n  ".join(map(_encode_line, value)) + "\n]"
    return json.dumps(value, default=encode_value)


def decode_record(raw: bytes, where: str = "") -> Record:
    """Decode a record; raise RecordError that says what is wrong with it."""
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
                remedy=NEWER_REMEDY,
            )
        if version != VERSION:
            raise ValueError(f"its version is {version!r}")
        record = decode_value(Record, values, may_lack=ADDED_FIELDS, may_exceed=False)
        return _add_findings(record) if "findings" not in (values["verdict"] or ["findings"]) else record
    except UnknownField as error:
        raise RecordError(f"A newer khod wrote the record: {error}", where=where, remedy=NEWER_REMEDY) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"The record cannot be understood: {error}", where=where, remedy=remedy) from None


def _add_findings(record: Record) -> Record:
    """Return the record with findings, which an earlier khod did not record: it had names and one sentence.

    The sentence becomes one finding. But if only producers are missing, each becomes a finding of its own, which is
    removed when that producer has its state again.
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
    """The directory of the record. Every method raises RecordError with path and cause."""

    directory: Path

    @property
    def record_path(self) -> Path:
        """The path of the record."""
        return self.directory / FILE_NAME

    def read(self) -> Record | None:
        """Read the record; return None if there is none."""
        try:
            return decode_record(self.record_path.read_bytes(), str(self.record_path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"The record cannot be read: {errno_text(error)}", where=str(self.record_path)) from error

    def write(self, record: Record, *, durable: bool = True) -> None:
        """Replace the record; without `durable` it survives the end of khod, but not a power failure."""
        self._replace_file(FILE_NAME, record, durable=durable)

    def write_departure(self, record: Record) -> None:
        """Write a copy of the record for the next kernel; both executors sync it to the disk."""
        self._replace_file(DEPARTURE, record, durable=False)

    def _replace_file(self, name: str, record: Record, *, durable: bool) -> None:
        """Replace a file atomically."""
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
        """Return the copy written at the last jump, or None if there is none that can be read."""
        try:
            return decode_record((self.directory / DEPARTURE).read_bytes(), DEPARTURE)
        except (OSError, RecordError):
            return None

    def remove_departure(self) -> None:
        """Remove the copy written at the last jump, if there is one."""
        try:
            (self.directory / DEPARTURE).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable_error(error, self.directory / DEPARTURE) from error

    def set_aside(self) -> Path | None:
        """Rename a record that cannot be read, because a new one replaces it; return its new path, or None."""
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
    def snapshots(self) -> snapshots.Snapshots:
        """The snapshots of state trees."""
        return snapshots.Snapshots(self.directory / "snapshots")

    def free_bytes(self) -> int:
        """Return the free bytes of the directory; raise RecordError if its file system is read-only."""
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
