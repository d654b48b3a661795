# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a profile run: the unit that runs it is started by systemd, which does not say for whom."""

import time

from khod.model import Announcement

ANNOUNCED_SECONDS = 60.0
"""How long the unit has to take its announcement: whoever starts it later is somebody else."""
MAX_ANNOUNCEMENTS = 64


class Announcements:
    """The announced runs by profile, each until it is taken, or too old."""

    def __init__(self) -> None:
        self._announced: dict[str, tuple[float, Announcement]] = {}

    def announce_run(self, profile: str, by: str, *, ignore_window: bool) -> None:
        """Keep that `by` has this profile run; a later announcement replaces an earlier one."""
        self._announced.pop(profile, None)
        while len(self._announced) >= MAX_ANNOUNCEMENTS:
            del self._announced[next(iter(self._announced))]
        self._announced[profile] = (time.monotonic(), Announcement(by, ignore_window))

    def take_announcement(self, profile: str) -> Announcement:
        """Return the announcement of this profile, and forget it; an empty one if there is none."""
        at, found = self._announced.pop(profile, (0.0, Announcement()))
        return found if time.monotonic() - at <= ANNOUNCED_SECONDS else Announcement()
