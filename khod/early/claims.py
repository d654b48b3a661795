# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may have back at once what it left: read from the record of the handover that led into this boot."""

import json

from khod.handover.session_names import session_of
from khod.kernel.mark import is_marked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Kernel(Protocol):
        """What the early restore asks of the kernel; `khod.abi.calls.Calls` has the same methods."""

        def read_file(self, path: str) -> bytes:
            """Read to end of file."""

        def retrieve_session(self, name: str) -> int:
            """Return the descriptor of a session that the previous kernel handed over."""

        def retrieve_fd(self, session: int, token: int) -> int:
            """Return a descriptor for a file of a retrieved session."""


RECORD_VERSION = 1
BOOT_ID = "/proc/sys/kernel/random/boot_id"
CMDLINE = "/proc/cmdline"
MAX_FDS = 253
"""SCM_MAX_FD: the descriptors that one message carries."""


class EarlyFile:
    """A file in a claim, with the pages of it that were read before the jump."""

    def __init__(self, name: str, token: int, spot: "Any") -> None:
        self.name = name
        self.token = token
        self.size: int = spot["size"]
        self.pages: list[int] = spot["pages"]
        self.digest: str = spot["digest"]


class EarlyClaim:
    """What a producer of root's left. It has back the descriptors of its files once it has called from this unit."""

    def __init__(self, run: str, holder: "Any") -> None:
        self.run = run
        self.name: str = holder["name"]
        self.unit: str = holder["owner"]["unit"]
        self.files = [EarlyFile(kept["name"], kept["token"], kept["spot"]) for kept in holder["kept"]]
        self.session = session_of(run, self.name) if self.files else ""
        self.fds: list[int] | None = None
        """The descriptors of its files, None before they were taken."""


def read_claims(record: str, kernel: "Kernel") -> list[EarlyClaim]:
    """Return the claims that the record leaves no question about, of the handover that led into this boot.

    For each of the following, khod would be asked instead: this boot is not the first start after the jump of the
    handover in the record; the owner is not root, whose rights depend on no configuration; somebody is told `restore`
    before it; a file of it was not read before the jump, so that nobody can tell whether it arrived.
    """
    try:
        with open(record, "rb") as file:
            found = json.load(file)
        if found["version"] != RECORD_VERSION or found["phase"] != "executing":
            return []
        if found["boot_id"] == kernel.read_file(BOOT_ID).decode().strip():
            return []
        run: str = found["run"]
        if not is_marked(kernel.read_file(CMDLINE).decode(errors="surrogateescape"), run):
            return []
        restoring = [holder for holder in found["producers"] if holder["restores"]]
        first = min((holder["rank"] for holder in restoring), default=0)
        return [EarlyClaim(run, holder) for holder in restoring if holder["rank"] == first and _is_plain(holder)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _is_plain(holder: "Any") -> bool:
    owner, spots = holder["owner"] or {}, [kept["spot"] for kept in holder["kept"]]
    return (
        holder["kind"] == "varlink"
        and holder["told"] == "freeze"
        and owner.get("uid") == 0
        and len(spots) <= MAX_FDS
        and all(spot is not None and not spot["gap"] for spot in spots)
    )
