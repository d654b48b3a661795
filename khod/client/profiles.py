# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about runs of profiles; apart from `khod.client.handover`, as those of the history."""

from khod.client.handover import Client
from khod.model import Announcement


class ProfileClient(Client):
    """A client of io.kho.Handover that also says and asks for whom a profile is run."""

    def announce(self, profile: str, *, ignore_window: bool, sudo_user: int | None) -> None:
        """Announce that the unit of a profile is started for the caller."""
        parameters = {"profile": profile, "ignore_window": ignore_window}
        self.call_method("Announce", parameters if sudo_user is None else parameters | {"sudo_user": sudo_user})
        self.receive_reply()

    def take_announcement(self, profile: str) -> Announcement:
        """Return for whom the unit of a profile was started, and forget it."""
        self.call_method("TakeAnnouncement", {"profile": profile})
        return self._decode_reply(Announcement, self.receive_reply(), "announcement")
