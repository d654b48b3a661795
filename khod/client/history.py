# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about past attempts; apart from `khod.client.handover`, so that `khoctl status` does not import them."""

from dataclasses import field

from khod.client.handover import Client
from khod.dataclass import dataclass
from khod.history.model import AttemptRecord, AttemptSummary

PAGE_ATTEMPTS = 500
"""The number of attempts asked for at once."""


@dataclass(frozen=True)
class History:
    """Attempts, newest first. `more` says that there are older ones, `note` what is wrong with the history, or ""."""

    attempts: list[AttemptSummary] = field(default_factory=list)
    more: bool = False
    note: str = ""


class HistoryClient(Client):
    """A client of io.kho.Handover that also asks about past attempts."""

    def history(self, limit: int) -> History:
        """Return the last attempts, `limit` at most, page by page."""
        found: list[AttemptSummary] = []
        while True:
            before = found[-1].run if found else None
            self.call_method("History", {"before": before, "limit": min(PAGE_ATTEMPTS, limit - len(found))})
            reply = self.receive_reply()
            page = self._decode_reply(list[AttemptSummary], reply, "attempts")
            more, note = self._decode_reply(bool, reply, "more"), self._decode_reply(str, reply, "note")
            found += page
            if not more or not page or len(found) >= limit:
                return History(found, more, note)

    def attempt(self, run: str = "") -> AttemptRecord:
        """Return an attempt by the beginning of its run, or the last one for ""."""
        self.call_method("Attempt", {"run": run})
        return self._decode_reply(AttemptRecord, self.receive_reply(), "attempt")

    def chain(self) -> list[AttemptSummary]:
        """Return the handovers since the last cold boot, newest first."""
        self.call_method("Chain")
        return self._decode_reply(list[AttemptSummary], self.receive_reply(), "attempts")

    def acknowledge(self, image: str) -> list[str]:
        """Let an image be tried again; return the runs that no longer count against it."""
        self.call_method("Acknowledge", {"image": image})
        return self._decode_reply(list[str], self.receive_reply(), "runs")
