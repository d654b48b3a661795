# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of this process its clients may take, counted where it comes in: connections, descriptors, bytes."""

import resource
from collections import Counter
from dataclasses import dataclass

OWN_DESCRIPTORS = 256
"""File descriptors that no client may take, root's neither: hooks' pipes, kernel files, the bus, images, the store."""

MAX_FDS = 253
"""File descriptors of one message: SCM_MAX_FD of the kernel, so no call takes more."""

MAX_MESSAGE_BYTES = 1 << 20
"""One message of root, an operator or a producer: the longest honest one names 253 files."""

MAX_OTHERS_MESSAGE_BYTES = 32 << 10
"""One message of everyone else: the longest honest one is a registration, about 13 KiB."""

FREE_BYTES = 4 << 10
"""Of an unfinished message and of an answer nobody has read yet, what a connection holds without being counted."""

BUFFERED_BYTES, USER_BUFFERED_BYTES = 32 << 20, 8 << 20
"""Unfinished messages and unread answers of all users but root together, and of one user."""


@dataclass(frozen=True)
class Limits:
    """File descriptors that clients may take, of those the process may have.

    What is left, about a fifth, is for root's connections and khod's own work: whatever the others hold, root can
    connect and a rollback can start hooks and open the kernel's files. With LimitNOFILE=8192 of the unit: 1024
    connections of other users, 512 of operators, 2560 producers, and 1024 files on their way to the kernel.
    """

    everyone: int
    others: int
    operators: int
    producers: int
    files: int
    unclosed: int
    """Sockets of clients that wait to be closed because somebody's descriptors are still in them."""

    @classmethod
    def divide_descriptors(cls, descriptors: int) -> "Limits":
        """Divide up so many descriptors."""
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
        """Divide up RLIMIT_NOFILE."""
        return cls.divide_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class Quota:
    """An amount of one thing that users may have, bounded in total and for each."""

    def __init__(self, total: int, per_user: int | None = None) -> None:
        self._total = total
        self._per_user = total if per_user is None else per_user
        self._taken = 0
        self._by_user: Counter[int] = Counter()

    @property
    def unused_amount(self) -> int:
        """What nobody has."""
        return self._total - self._taken

    def amount_of(self, uid: int) -> int:
        """What a user has."""
        return self._by_user[uid]

    def has_room(self, uid: int, amount: int) -> bool:
        """Tell whether `take_amount` would succeed."""
        return amount <= self.unused_amount and self._by_user[uid] + amount <= self._per_user

    def take_amount(self, uid: int, amount: int = 1) -> bool:
        """Take so much for a user; False, and nothing is taken, where it is too much."""
        if not self.has_room(uid, amount):
            return False
        self._taken += amount
        self._by_user[uid] += amount
        return True

    def give_back(self, uid: int, amount: int = 1) -> None:
        """Give back what was taken."""
        self._taken -= amount
        self._by_user[uid] -= amount
        if not self._by_user[uid]:
            del self._by_user[uid]
