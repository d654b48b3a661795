# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of this process its clients may use, counted on arrival: connections, descriptors, bytes."""

import resource
from collections import Counter

from khod.dataclass import dataclass
from khod.wire import MAX_FDS

OWN_DESCRIPTORS = 256
"""Descriptors that no client may use, not even root: hooks' pipes, kernel files, the bus, images, the store."""


MAX_MESSAGE_BYTES = 1 << 20
"""The maximum size of a message from root, an operator or a producer; the longest valid one names 253 files."""

MAX_OTHERS_MESSAGE_BYTES = 32 << 10
"""The maximum size of a message from all others; the longest valid one is a registration, about 13 KiB."""

FREE_BYTES = 4 << 10
"""The part of an unfinished message and of an unread answer that is not counted, for each connection."""

BUFFERED_BYTES, USER_BUFFERED_BYTES = 32 << 20, 8 << 20
"""The maximum of unfinished messages and unread answers, for all users except root together, and for one user."""


@dataclass(frozen=True)
class Limits:
    """The descriptors that clients may use, out of those of the process.

    The rest, about a fifth, is for root's connections and khod's own work: whatever the others hold, root can connect
    and a rollback can start hooks and open the kernel's files. With the unit's LimitNOFILE=8192 these are 1024
    connections of other users, 512 of operators, 2560 producers, and 1024 files on their way to the kernel.
    """

    everyone: int
    others: int
    operators: int
    producers: int
    files: int
    unclosed: int
    """Sockets of clients that wait to be closed because unread descriptors are still in them."""

    @classmethod
    def divide_descriptors(cls, descriptors: int) -> "Limits":
        """Divide this number of descriptors."""
        return cls(
            everyone=descriptors - OWN_DESCRIPTORS,
            others=descriptors // 8,
            operators=descriptors // 16,
            producers=descriptors * 5 // 16,
            files=max(MAX_FDS, descriptors // 8),
            unclosed=descriptors // 32,
        )

    @classmethod
    def of_process(cls) -> "Limits":
        """Divide RLIMIT_NOFILE."""
        return cls.divide_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class Quota:
    """An amount of one resource for users, limited in total and for each user."""

    def __init__(self, total: int, per_user: int | None = None) -> None:
        self._total = total
        self._per_user = total if per_user is None else per_user
        self._taken = 0
        self._by_user: Counter[int] = Counter()

    @property
    def unused_amount(self) -> int:
        """The amount that no user has."""
        return self._total - self._taken

    def amount_of(self, uid: int) -> int:
        """Return the amount that a user has."""
        return self._by_user[uid]

    def has_room(self, uid: int, amount: int) -> bool:
        """Whether `take_amount` would succeed."""
        return amount <= self.unused_amount and self._by_user[uid] + amount <= self._per_user

    def take_amount(self, uid: int, amount: int = 1) -> bool:
        """Take an amount for a user; return False, and take nothing, if it is too much."""
        if not self.has_room(uid, amount):
            return False
        self._taken += amount
        self._by_user[uid] += amount
        return True

    def give_back(self, uid: int, amount: int = 1) -> None:
        """Give an amount back."""
        self._taken -= amount
        self._by_user[uid] -= amount
        if not self._by_user[uid]:
            del self._by_user[uid]
