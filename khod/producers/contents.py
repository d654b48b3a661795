# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contents of preserved files: pages are read while the producers are frozen, and again in the next kernel.

khod keeps a descriptor of its own of each file, not in the service manager's store: systemd would preserve the file a
second time. A khod that was restarted has none, and says so. To read a hole of a memfd allocates nothing
(shmem_file_read_iter() copies zeros); there are none left in any case, because preserving has filled them.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

from khod.concurrency.worker import Worker
from khod.config import VerifySettings
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.errors import KhoError, errno_text
from khod.kernel.pages import MARK_DIGITS, Read, count_pages, digest_pages, read_page, read_size
from khod.model import Check, CheckResult, Finding, FindingSeverity, FindingSource, Kept, Spot
from khod.text import join_names

if TYPE_CHECKING:
    import random
else:
    random = defer_module("random")

SPOT_SECONDS = 1.0
"""Seconds of the blackout that reading all files may take; what was not read by then is not compared."""
MAX_DESCRIPTORS = 1024
"""Descriptors that khod keeps: an eighth of LimitNOFILE= of its unit."""
MAX_PAGES_NAMED = 4
RESTARTED = "khod was restarted after the file was handed over, and has no descriptor of it"
TOO_MANY = f"khod keeps descriptors of {MAX_DESCRIPTORS} files, and has those of others"
UNREAD = "it was not read before the jump"


class Chooser(Protocol):
    """Chooses pages: `random.SystemRandom`, so that no producer knows which."""

    def sample(self, population: range, k: int) -> list[int]:
        """Return `k` different members of the population."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one file: how many of its pages were compared, and which of these differ.

    With a `gap` it was not compared, for this reason; `other` is a difference that is not one of pages.
    """

    producer: str
    name: str
    compared: int = 0
    pages: int = 0
    differing: tuple[int, ...] = ()
    other: str = ""
    gap: str = ""

    @property
    def differs(self) -> bool:
        """Whether the file arrived with other contents."""
        return bool(self.differing or self.other)

    def describe(self) -> str:
        """Return the evidence, for people."""
        if self.gap:
            return f"{self.name}: not compared: {self.gap}"
        if self.other:
            return f"{self.name}: {self.other}"
        compared = f"{self.compared} of {self.pages} pages compared"
        if self.differing:
            named = join_names(map(str, self.differing), MAX_PAGES_NAMED)
            return f"{self.name}: {compared}, {len(self.differing)} of them differ (page {named})"
        return f"{self.name}: {compared}"


class KeptFiles:
    """The descriptors that khod keeps of preserved files, by session and token, and what came of each comparison.

    All reading, and the closing after it, is done by `worker`. No method raises an error of a file.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Callable[[], VerifySettings] = VerifySettings,
        *,
        given_before: Set[str] = frozenset(),
    ) -> None:
        """The files of the producers `given_before` were compared by the early restore of an earlier khod of this boot.

        They were the same, and their producers may have changed them since.
        """
        self._worker = worker
        self._settings = settings
        self._fds: dict[str, dict[int, int]] = {}
        self._gaps: dict[tuple[str, int], str] = {}
        """Why there is no descriptor of a file, by session and token."""
        self._compared: dict[tuple[str, str], Comparison] = {}
        self._given_before = given_before

    def keep_files(self, session: str, files: Sequence[tuple[Kept, int]]) -> None:
        """Keep a descriptor of each file until `release_session`; without one the file is not compared."""
        own = self._fds.setdefault(session, {})
        room = MAX_DESCRIPTORS - sum(map(len, self._fds.values()))
        for number, (kept, fd) in enumerate(files):
            if number >= room:
                self._gaps[session, kept.token] = TOO_MANY
                continue
            try:
                own[kept.token] = os.dup(fd)
            except OSError as error:
                self._gaps[session, kept.token] = f"khod could not keep a descriptor of it: {errno_text(error)}"

    def release_session(self, session: str) -> None:
        """Close the descriptors of a session, after what is being read."""
        for fd in self._fds.pop(session, {}).values():
            self._close(fd)
        self._gaps = {key: why for key, why in self._gaps.items() if key[0] != session}

    def _close(self, fd: int) -> None:
        self._worker.call_later(partial(os.close, fd))

    async def take_spots(self, wanted: Mapping[str, Sequence[Kept]]) -> dict[str, tuple[Kept, ...]]:
        """Read pages of the files in `wanted`, by session; return the same files with their spots.

        A file that has a spot keeps it. This takes SPOT_SECONDS at most. The first file of each session is read before
        the second one of any: a producer with many files leaves time for the others.
        """
        settings, until = self._settings(), time.monotonic() + SPOT_SECONDS
        jobs = [
            (session, kept.token, self._fds.get(session, {}).get(kept.token))
            for turn in zip_longest(*([(session, kept) for kept in files] for session, files in wanted.items()))
            for session, kept in filter(None, turn)
            if kept.spot is None
        ]
        taken: dict[tuple[str, int], Spot] = {}

        def take() -> None:
            for session, token, fd in jobs:
                if time.monotonic() > until:
                    return
                why = self._gaps.get((session, token), RESTARTED)
                taken[session, token] = Spot(gap=why) if fd is None else take_spot(fd, settings)

        if jobs:
            with suppress(KhoError):  # it hangs: what was not read has a gap
                await self._worker.call_within(take, "reading preserved files", SPOT_SECONDS)
        late = Spot(gap=f"{UNREAD}: reading all files took longer than {SPOT_SECONDS:g} s")
        return {
            session: tuple(replace(kept, spot=kept.spot or taken.get((session, kept.token), late)) for kept in files)
            for session, files in wanted.items()
        }

    async def compare_files(self, producer: str, files: Sequence[Kept], fds: Sequence[int], deadline: float) -> None:
        """Compare files that came from the previous kernel, before the producer has them.

        Only the first time: what it was given before, it may have changed.
        """
        if producer in self._given_before:
            for kept in files:
                if kept.spot is not None:
                    self.note_unchanged(producer, kept.name, kept.spot.size, kept.spot.pages)
        jobs = [(kept, fd) for kept, fd in zip(files, fds, strict=True) if (producer, kept.name) not in self._compared]

        def compare() -> list[Comparison]:
            return [compare_spot(producer, kept, fd) for kept, fd in jobs]

        try:
            found = await self._worker.call_within(compare, "comparing preserved files", deadline) if jobs else []
        except KhoError as error:
            found = [Comparison(producer, kept.name, gap=error.what) for kept, _ in jobs]
        self._compared |= {(producer, one.name): one for one in found}

    def note_unchanged(self, producer: str, name: str, size: int, pages: Sequence[int]) -> None:
        """Note that these pages of a file of `size` bytes were compared, or all without any, and are the same."""
        total = count_pages(size)
        self._compared[producer, name] = Comparison(producer, name, len(pages or range(total)), total)

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close descriptors that may still be read."""
        for fd in fds:
            self._close(fd)

    @property
    def comparisons(self) -> list[Comparison]:
        """What came of every comparison in this boot, as far as this khod made it."""
        return list(self._compared.values())


def check_contents(producer: str, found: Sequence[Comparison], *, given_before: bool) -> tuple[Check, list[Finding]]:
    """Return the check of one producer's files, and a finding for each that differs.

    With `given_before` an earlier khod of this boot may have given it the files: then a difference proves nothing.
    """
    differing = [] if given_before else [one for one in found if one.differs]
    uncertain = [one for one in found if one.gap or (one.differs and given_before)]
    shown = [
        replace(one, gap="an earlier khod may have given it to the producer before")
        if one in uncertain and not one.gap
        else one
        for one in found
    ]
    result = CheckResult.fail if differing else CheckResult.skipped if uncertain else CheckResult.passed
    remedy = "Do not trust what it took back: start it anew, and test the host's memory." if differing else ""
    check = Check(contents_check(producer), result, "; ".join(one.describe() for one in shown), remedy)
    findings = [
        Finding(
            producer,
            f"a file arrived with other contents: {one.describe()}",
            FindingSource.content,
            one.name,
            FindingSeverity.changed,
        )
        for one in differing
    ]
    return check, findings


def contents_check(producer: str) -> str:
    """Return the name of the check of one producer's files."""
    return f"contents {producer}"


def take_spot(fd: int, settings: VerifySettings) -> Spot:
    """Read pages of a file: all of them if it has no more than `whole_bytes`, else `pages` at random."""
    try:
        size = read_size(fd)
        return read_spot(partial(read_page, fd), size, settings, random.SystemRandom())
    except OSError as error:
        return Spot(gap=f"{UNREAD}: {errno_text(error)}")
    except ValueError as error:
        return Spot(gap=f"{UNREAD}: {error}")


def read_spot(read: Read, size: int, settings: VerifySettings, chooser: Chooser) -> Spot:
    """Return the spot of a file of `size` bytes; OSError if it cannot be read."""
    total = count_pages(size)
    whole = size <= settings.whole_bytes or total <= settings.pages
    chosen = () if whole else tuple(sorted(chooser.sample(range(total), settings.pages)))
    digest, marks = digest_pages(read, chosen or range(total))
    return Spot(size, chosen, digest, marks)


def compare_spot(producer: str, kept: Kept, fd: int) -> Comparison:
    """Compare a file that arrived with its spot."""
    spot = kept.spot
    if spot is None or spot.gap:
        return Comparison(producer, kept.name, gap=spot.gap if spot else UNREAD)
    try:
        size = read_size(fd)
        if size != spot.size:
            return Comparison(producer, kept.name, other=f"it has {size} bytes, and had {spot.size}")
        return compare_pages(producer, kept.name, spot, partial(read_page, fd))
    except (OSError, ValueError) as error:
        text = errno_text(error) if isinstance(error, OSError) else str(error)
        return Comparison(producer, kept.name, gap=f"it could not be read: {text}")


def compare_pages(producer: str, name: str, spot: Spot, read: Read) -> Comparison:
    """Compare the pages of a spot with what `read` gives; OSError if that fails."""
    total = count_pages(spot.size)
    chosen: Sequence[int] = spot.pages or range(total)
    digest, marks = digest_pages(read, chosen)
    before, now = _split_marks(spot.marks), _split_marks(marks)
    differing = tuple(page for page, old, new in zip(chosen, before, now, strict=False) if old != new)
    other = "its pages differ" if digest != spot.digest and not differing else ""
    return Comparison(producer, name, len(chosen), total, differing, other)


def _split_marks(marks: str) -> Iterator[str]:
    return (marks[at : at + MARK_DIGITS] for at in range(0, len(marks), MARK_DIGITS))
