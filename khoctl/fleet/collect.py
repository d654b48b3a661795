# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the hosts say: over ssh, some at a time and each within a deadline, or from files that khoctl wrote there."""

import glob
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from khoctl.fleet.inventory import FleetMember
from khoctl.fleet.model import HostView, Remark, RemarkKind
from khoctl.follow import ENDED
from khoctl.history import outcome_name
from khoctl.remote_client import RemoteClient
from khoctl.render import phase_name
from khod import values, wire
from khod.errors import Exit, KhoError, Refused, Unsupported, UsageError, errno_text
from khod.files import open_regular
from khod.history.model import AttemptSummary
from khod.model import Generation, Phase, Status
from khod.text import join_names, one_line, shorten

MAX_FILE_BYTES = 32 << 20
MAX_TEXT = 300
MAX_VERSION = 64
MAX_ATTEMPTS = 500
MAX_SECONDS = 1e11
"""A larger number is not taken for a time."""
ARRIVED = frozenset((Phase.verified, Phase.degraded))
CLOCK_SECONDS = 5.0
"""A clock that differs by more is one that was not set."""
EXPORT_REMEDY = "Give the output of `khoctl history --json`; that of `khoctl status --json` may stand before it."


def ask_hosts(members: Sequence[FleetMember], *, attempts: int, parallel: int, limit: float) -> list[HostView]:
    """Ask khod of each host over ssh, `parallel` at a time; each has `limit` seconds, and a failure is its remark."""
    with ThreadPoolExecutor(max_workers=max(1, min(parallel, len(members)))) as pool:
        return list(pool.map(lambda member: _ask_host(member, attempts, limit), members))


def _ask_host(member: FleetMember, attempts: int, limit: float) -> HostView:
    late = threading.Event()
    try:
        with RemoteClient(member.destination, patience=limit, batch=True) as khod:

            def give_up() -> None:
                late.set()
                khod.shutdown()

            timer = threading.Timer(limit, give_up)
            timer.start()
            try:
                return _ask_khod(member.name, khod, attempts)
            finally:
                timer.cancel()
    except KhoError as error:
        what = f"It did not answer within {limit:g} s" if late.is_set() else one_line(error.what, MAX_TEXT)
        kinds = {Unsupported: RemarkKind.without_kho, Refused: RemarkKind.refused_login}
        kind = next((kinds[cls] for cls in type(error).__mro__ if cls in kinds), RemarkKind.not_reached)
        return HostView(name=member.name, state=kind.value, remarks=[Remark(kind, what)])


def _ask_khod(name: str, khod: RemoteClient, attempts: int) -> HostView:
    khod.send_call(f"{wire.SERVICE}.GetInfo")
    version = khod.receive_reply().get("version")
    status = khod.status()
    found = khod.history(attempts).attempts if status.generation is not Generation.none else []
    sent = time.time()
    khod.call_method("Monitor", more=True)
    there = _finite(khod.receive_event().at)  # the first event has the time of the call
    received = time.time()
    view = describe_host(name, status, found[:attempts])
    return replace(
        view,
        khod=shorten(str(version), MAX_VERSION) if isinstance(version, str) else "",
        **_measure_clock(there, sent, received),
        remarks=[*view.remarks, *_check_clock(there, sent, received)],
    )


def _measure_clock(there: float | None, sent: float, received: float) -> dict[str, Any]:
    if there is None:
        return {}
    offset, error = there - (sent + received) / 2, (received - sent) / 2
    return {"clock_offset_seconds": round(offset, 3), "clock_error_seconds": round(error, 3)}


def _check_clock(there: float | None, sent: float, received: float) -> Iterator[Remark]:
    """Yield a remark where the clocks differ by more than CLOCK_SECONDS whatever the connection took."""
    if there is not None and not sent - CLOCK_SECONDS <= there <= received + CLOCK_SECONDS:
        offset = there - (sent + received) / 2
        side = "ahead of" if offset > 0 else "behind"
        yield Remark(RemarkKind.clock_off, f"Its clock is {abs(offset):.0f} s {side} this host's")


def read_exports(patterns: Sequence[str]) -> list[HostView]:
    """Return a host for each file that the patterns name; a directory stands for its `*.json`.

    A host has its file's name. Raises UsageError where a pattern names no file.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = (
            sorted(Path(pattern).glob("*.json")) if Path(pattern).is_dir() else sorted(map(Path, glob.glob(pattern)))
        )
        if not found:
            raise UsageError("There is no such file", where=pattern, remedy=EXPORT_REMEDY)
        paths |= dict.fromkeys(found)
    return [_read_export(path) for path in paths]


def _read_export(path: Path) -> HostView:
    name = path.name.removesuffix(".json")
    try:
        with open(open_regular(str(path), "file"), "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            return _unreadable(name, f"The file is larger than {MAX_FILE_BYTES >> 20} MiB")
        status, found = _decode_export(data.decode())
    except OSError as error:
        return _unreadable(name, f"The file cannot be read: {errno_text(error)}")
    except UsageError as error:
        return _unreadable(name, error.what)
    except RecursionError:
        return _unreadable(name, "It is not what khoctl writes with --json: it is nested too deeply")
    except ValueError as error:
        return _unreadable(name, f"It is not what khoctl writes with --json: {one_line(str(error), MAX_TEXT)}")
    return describe_host(name, status, found[:MAX_ATTEMPTS])


def _decode_export(text: str) -> tuple[Status | None, list[AttemptSummary]]:
    """Return the status and the attempts of a file; raises ValueError if it has none of both."""
    status, found, known = None, list[AttemptSummary](), False
    for line in text.splitlines():
        value = json.loads(line) if line.strip() else {}
        if not isinstance(value, dict):
            raise ValueError("a line of it is not an object")
        if "attempts" in value:
            attempts = value["attempts"]
            if isinstance(attempts, list):
                attempts = attempts[:MAX_ATTEMPTS]
            found = values.decode_value(list[AttemptSummary], attempts, "attempts", may_lack=values.ANY_FIELD)
            known = True
        elif "phase" in value:
            status, known = values.decode_value(Status, value, may_lack=values.ANY_FIELD), True
    if not known:
        raise ValueError("it has neither `attempts` nor a status")
    return status, found


def _unreadable(name: str, why: str) -> HostView:
    return HostView(name=name, state=RemarkKind.unreadable.value, remarks=[Remark(RemarkKind.unreadable, why)])


def describe_host(name: str, status: Status | None, attempts: Sequence[AttemptSummary]) -> HostView:
    """Return a host with what its own answers say of it; without a status, what its last attempt says."""
    found = [_bound_attempt(one) for one in attempts]
    last = found[0] if found else None
    if status is None:
        state = outcome_name(last) if last else "no attempts"
        kernel = "" if last is None else last.to_release if last.outcome in ARRIVED else last.from_release
        return HostView(name=name, state=state, kernel=kernel, attempts=found, remarks=list(_judge_attempt(last)))
    if status.generation is Generation.none:
        remark = Remark(RemarkKind.without_kho, "Its kernel has no Kexec HandOver")
        kernel = shorten(status.kernel_release, MAX_VERSION)
        return HostView(name=name, state=RemarkKind.without_kho.value, kernel=kernel, remarks=[remark])
    remarks = list(_judge_status(status)) or list(_judge_rollback(last))
    return HostView(
        name=name,
        state=phase_name(status.phase),
        kernel=shorten(status.kernel_release, MAX_VERSION),
        attempts=found,
        remarks=remarks,
    )


def _judge_status(status: Status) -> Iterator[Remark]:
    cause = one_line(status.last_error or status.summary, MAX_TEXT)
    if status.exit_code == Exit.not_rolled_back or status.phase is Phase.failed:
        yield Remark(RemarkKind.not_rolled_back, cause)
    if status.phase is Phase.inconsistent:
        yield Remark(RemarkKind.inconsistent, cause)
    if status.foreign or status.phase is Phase.foreign:
        yield Remark(RemarkKind.foreign, "Another program uses KHO or kexec")
    if status.outcome is Phase.degraded:
        found = status.verdict.reason if status.verdict else ""
        yield Remark(RemarkKind.degraded, one_line(found or status.summary, MAX_TEXT))
    if status.outcome is Phase.cold_boot:
        reason = status.cold_boot.reason if status.cold_boot else ""
        yield Remark(RemarkKind.cold_boot, one_line(reason or status.summary, MAX_TEXT))
    if status.phase not in ENDED:
        yield Remark(RemarkKind.under_way, f"{phase_name(status.phase)}, run {shorten(status.run, MAX_VERSION) or '?'}")
    if status.claims:
        yield Remark(RemarkKind.claims, f"Not taken back since the last jump: {one_line(join_names(status.claims))}")


def _judge_attempt(last: AttemptSummary | None) -> Iterator[Remark]:
    """Yield what the last attempt alone says of a host."""
    kinds = {
        Phase.failed: RemarkKind.not_rolled_back,
        Phase.degraded: RemarkKind.degraded,
        Phase.cold_boot: RemarkKind.cold_boot,
    }
    if last is not None and last.outcome in kinds:
        yield Remark(kinds[last.outcome], last.reason or f"Run {last.run}")
    yield from _judge_rollback(last)


def _judge_rollback(last: AttemptSummary | None) -> Iterator[Remark]:
    if last is not None and last.outcome is Phase.idle:
        yield Remark(RemarkKind.rolled_back, last.reason or f"Run {last.run}")


def _bound_attempt(found: AttemptSummary) -> AttemptSummary:
    """Return an attempt whose texts are short, and whose numbers can be counted with."""
    blackout = _finite(found.blackout_seconds)
    return replace(
        found,
        run=one_line(found.run, MAX_VERSION),
        reason=one_line(found.reason, MAX_TEXT),
        from_release=one_line(found.from_release, MAX_VERSION),
        to_release=one_line(found.to_release, MAX_VERSION),
        by=one_line(found.by, MAX_VERSION),
        first_boot_id=one_line(found.first_boot_id, MAX_VERSION),
        last_boot_id=one_line(found.last_boot_id, MAX_VERSION),
        damage=one_line(found.damage, MAX_TEXT),
        began_at=_finite(found.began_at) or 0.0,
        ended_at=_finite(found.ended_at) or 0.0,
        blackout_seconds=blackout,
        blackout_error_seconds=_finite(found.blackout_error_seconds) or 0.0,
    )


def _finite(number: float | None) -> float | None:
    """Return a number that may be a time, None for what cannot be one."""
    try:
        found = None if number is None else float(number)
    except OverflowError:
        return None
    return found if found is not None and math.isfinite(found) and 0 <= found < MAX_SECONDS else None
