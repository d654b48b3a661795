# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describe an errno of the kernel: what it means at this call, on this machine, and what to do next."""

import platform
import re
from typing import TypedDict

from khod.errors import Failed, KhoError, errno_text
from khod.kernel.errnos import ACTIVATE, DEACTIVATE, EXECUTE, LOAD, LOAD_ON, LOG, SERIALIZE, UNLOAD, Errnos
from khod.kernel.protocol import AbortKind
from khod.model import Generation, Step

STEP_CALLS = {
    Step.activate: "The kernel did not enter the active phase",
    Step.load: "The kernel did not take the image",
    Step.execute: "The jump failed",
}
UNDO_CALLS = {Step.activate: "Leaving the active phase failed", Step.load: "Unloading the image failed"}


class Words(TypedDict):
    """The parts of one of khod's errors."""

    what: str
    where: str
    remedy: str


def put_errno(what: str, table: Errnos, error: OSError, otherwise: str = LOG, quoted: str = "") -> Words:
    """Describe an errno: `what` failed, what the errno means there, and what to do next.

    `quoted` is the kernel log's own line about it (`khod.kernel.log.relevant_lines`), "" without one. An errno that is
    not in `table` is shown by name and meaning only, with the remedy `otherwise`.
    """
    meaning, remedy = table.get(error.errno or 0, ("", otherwise))
    because = f", {meaning}" if meaning else ""
    says = f"; the kernel log says: {quoted.rstrip('.')}" if quoted else ""
    return {"what": f"{what}: {errno_text(error)}{because}{says}", "where": str(error.filename or ""), "remedy": remedy}


def explain_errno(
    step: Step, error: OSError, quoted: str = "", *, generation: Generation = Generation.none, machine: str = ""
) -> Failed:
    """Return the error for the failed kernel call of `step`.

    `machine` is as in uname -m, "" for this one. `generation` is the one whose active phase was to be entered, `none`
    if it is not known.
    """
    if step is Step.activate and (cause := _explain_serialization(quoted)):
        return Failed(**put_errno(STEP_CALLS[step], {error.errno or 0: cause}, error, quoted=quoted))
    loading = {**LOAD, **LOAD_ON.get(machine or platform.machine(), {})}
    tables = {Step.load: loading, Step.activate: ACTIVATE[generation], Step.execute: EXECUTE}
    return Failed(**put_errno(STEP_CALLS[step], tables[step], error, quoted=quoted))


def _explain_serialization(quoted: str) -> tuple[str, str] | None:
    """Return what v3 itself logs about a failed activation, and what to do; its errno is always the same."""
    found = re.search(r"kho failed to serialize state: -(\d+)", quoted)
    return SERIALIZE.get(int(found[1])) if found else None


def explain_undo(step: Step, error: OSError, quoted: str = "", *, generation: Generation = Generation.none) -> KhoError:
    """Return the error for the failed kernel call of the rollback of `step` (activate or load)."""
    table = UNLOAD if step is Step.load else DEACTIVATE.get(generation, {})
    return KhoError(**put_errno(UNDO_CALLS[step], table, error, quoted=quoted))


FORGOT = {
    AbortKind.forgets: "an abort made this kernel forget what was preserved before finalize (6.16-6.18 do); "
    "what a handover would carry from here on cannot be told until a reboot",
}
