# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may have back at once what it left: read from the record of the handover that led into this boot."""

import json

from khod.abi.proc import read_boot_id, read_cmdline
from khod.handover.directory import VERSION
from khod.handover.session_names import session_of
from khod.kernel.mark import is_marked
from khod.kernel.pages import count_pages
from khod.wire import MAX_FDS, PRODUCER_VERSION, VERB_SECONDS

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


DEFAULT_TERMS: "dict[str, Any]" = {"timeout": VERB_SECONDS, "after": [], "before": [], "devices": [], "kind": "varlink"}
"""Of a producer that does not name them."""


class EarlyFile:
    """A file in a claim, with the pages of it that were read before the jump."""

    def __init__(self, kept: "Any") -> None:
        """Read it from the record; any exception means that the record is odd."""
        spot = kept["spot"]
        self.name: str = _require(kept["name"], str)
        self.token: int = _require_below(1 << 64, kept["token"])
        self.size: int = _require_below(1 << 63, spot["size"])
        self.pages = [_require_below(count_pages(self.size), page) for page in _require(spot["pages"], list)]
        self.digest: str = _require(spot["digest"], str)


class EarlyClaim:
    """What a producer of root's left. It has back the descriptors of its files once it has called from this unit."""

    def __init__(self, run: str, holder: "Any") -> None:
        """Read it from the record; any exception means that the record is odd."""
        self.run = run
        self.name: str = _require(holder["name"], str)
        self.unit: str = _require(holder["owner"]["unit"], str)
        self.timeout: float = _require(holder["timeout"], int, float)
        names = {what: _require(holder[what], list) for what in ("after", "before", "devices")}
        kind = holder["shown_kind"] or DEFAULT_TERMS["kind"]
        self._terms = {"name": self.name, "version": PRODUCER_VERSION, "timeout": self.timeout, "kind": kind, **names}
        self.files = [EarlyFile(kept) for kept in holder["kept"]]
        self.session = session_of(run, self.name) if self.files else ""
        self.fds: list[int] | None = None
        """The descriptors of its files, None before they were taken."""

    def has_terms(self, terms: "dict[str, Any]") -> bool:
        """Whether a producer registers with the terms it had before the jump, which a khod has checked."""
        numbers = type(terms.get("version")) is int and not isinstance(terms.get("timeout"), bool)
        return numbers and {**DEFAULT_TERMS, **terms} == self._terms


def read_claims(record: str, kernel: "Kernel") -> list[EarlyClaim]:
    """Return the claims that the record leaves no question about, of the handover that led into this boot.

    For each of the following, khod would be asked instead: this boot is not the first start after the jump of the
    handover in the record; the owner is not root, whose rights depend on no configuration; somebody is told `restore`
    before it; a file of it was not read before the jump, so that nobody can tell whether it arrived. If the record is
    odd in any way, all of it is left to khod, which says what is wrong.
    """
    try:
        with open(record, "rb") as file:
            found = json.load(file)
        if found["version"] != VERSION or found["phase"] != "executing":
            return []
        if found["boot_id"] == read_boot_id(kernel):
            return []
        run: str = _require(found["run"], str)
        if not is_marked(read_cmdline(kernel), run):
            return []
        if len({holder["name"] for holder in found["producers"]}) < len(found["producers"]):
            return []
        restoring = [holder for holder in found["producers"] if holder["restores"]]
        first = min((_require(holder["rank"], int) for holder in restoring), default=0)
        return [EarlyClaim(run, holder) for holder in restoring if holder["rank"] == first and _is_plain(holder)]
    except Exception:  # noqa: BLE001 - khod starts, whatever stands in the record
        return []


def _is_plain(holder: "Any") -> bool:
    owner, spots = holder["owner"], [kept["spot"] for kept in holder["kept"]]
    return (
        holder["kind"] == "varlink"
        and holder["told"] == "freeze"
        and owner is not None
        and owner["uid"] == 0
        and len(spots) <= MAX_FDS
        and all(spot is not None and not spot["gap"] for spot in spots)
    )


def _require(value: "Any", *kinds: type) -> "Any":
    """Return a value that is of one of these types, and not only of a subclass as a boolean is."""
    if type(value) not in kinds:
        raise TypeError(value)
    return value


def _require_below(limit: int, value: "Any") -> int:
    if not 0 <= _require(value, int) < limit:
        raise ValueError(value)
    return value  # type: ignore[no-any-return]
