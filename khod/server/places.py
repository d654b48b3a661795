# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places for connections: how many there are of each kind, and for each user."""

from collections import Counter
from collections.abc import Callable

from khod.server.access import Standing
from khod.server.limits import Limits, Quota


class Places:
    """All places of the server."""

    def __init__(self, limits: Limits, max_per_user: Callable[[], int]) -> None:
        """Allow `max_per_user` connections for each user except root; those of producers are not counted."""
        self.max_per_user = max_per_user
        self.connections = 0
        self.max_connections = limits.everyone
        self.askers: Counter[int] = Counter()
        self.by_standing = {
            Standing.other: Quota(limits.others),
            Standing.producer: Quota(limits.producers),
            Standing.operator: Quota(limits.operators),
            Standing.root: Quota(limits.everyone),
        }

    def has_enough(self, uid: int) -> bool:
        """Whether a user has the maximum of connections; those of producers are not counted."""
        return self.askers[uid] >= self.max_per_user()

    def take_place(self, uid: int, standing: Standing) -> "Place | None":
        """Take a place for a connection; return None if the user, or all users of this standing, have the maximum."""
        quota = self.by_standing[standing]
        if standing is Standing.root:
            if self.connections >= self.max_connections:
                return None
        elif self.has_enough(uid):
            return None
        # The fewer places are left, the fewer one user may have, so that the next user finds one.
        if standing is Standing.other and quota.amount_of(uid) > 0 and quota.amount_of(uid) >= quota.unused_amount // 2:
            return None
        return Place(self, uid, standing) if quota.take_amount(uid) else None


class Place:
    """The place of one connection, which may become a producer's."""

    def __init__(self, places: Places, uid: int, standing: Standing) -> None:
        self._places = places
        self._uid = uid
        self._standing = standing
        self._is_askers = standing is not Standing.root
        self._is_reserved = False
        places.connections += 1
        if self._is_askers:
            places.askers[uid] += 1

    def reserve_producers(self) -> bool:
        """Reserve a place for a producer that registers; False if there is none. Call `settle_place` afterwards."""
        if self._standing in (Standing.other, Standing.operator):
            self._is_reserved = self._places.by_standing[Standing.producer].take_amount(self._uid)
            return self._is_reserved
        return True

    def settle_place(self, *, registered: bool) -> None:
        """Become a producer's place, or give the reservation back."""
        if registered:
            self._give_asker()
            if self._is_reserved:
                self._places.by_standing[self._standing].give_back(self._uid)
                self._standing = Standing.producer
        elif self._is_reserved:
            self._places.by_standing[Standing.producer].give_back(self._uid)
        self._is_reserved = False

    def give_back(self) -> None:
        """Give the place back, because the connection has ended and its descriptor is closed."""
        self._give_asker()
        self._places.by_standing[self._standing].give_back(self._uid)
        self._places.connections -= 1

    def _give_asker(self) -> None:
        if self._is_askers:
            self._is_askers = False
            self._places.askers[self._uid] -= 1
            if not self._places.askers[self._uid]:
                del self._places.askers[self._uid]
