# SPDX-License-Identifier: LGPL-2.1-or-later
"""The jump after it was requested: whether it may still be aborted, and what happens if it does not come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from khod.config import Settings
from khod.engine.transaction import Transaction, told_error
from khod.errors import Failed, KhoError, Refused
from khod.model import Phase

if TYPE_CHECKING:
    from khod.engine.attempt import Attempt

WATCH_SECONDS = 10.0
"""Minimum seconds between two questions to systemd whether the host still goes down."""


class Jump:
    """Watches the phase `executing`; `give_up` rolls the handover back with a cause, if the host is still up then."""

    def __init__(
        self, transaction: Transaction, settings: Settings, give_up: Callable[[KhoError], Awaitable[None]]
    ) -> None:
        self._transaction = transaction
        self._settings = settings
        self._give_up = give_up
        self.going_down = False
        """Whether another program has sent the host into the kexec, and khod lets it happen."""

    @property
    def in_kernel(self) -> bool:
        """Whether reboot(2) was called and has not returned."""
        attempt = self._transaction.attempt
        return self._transaction.phase is Phase.executing and attempt is not None and attempt.in_kernel

    def go_along(self) -> None:
        """Do not request the jump any more: the host is on its way."""
        self.going_down = True
        if (attempt := self._transaction.attempt) is not None:
            attempt.going_down = True

    def refuse_in_kernel(self) -> None:
        """Raise Refused while reboot(2) may jump at any moment: nothing is undone before it has returned."""
        if self.in_kernel:
            raise Refused(
                "reboot(2) is in the kernel and cannot be called back",
                where="abort",
                remedy="Wait: where it comes back, khod puts everything back by itself.",
            )

    async def refuse_on_the_way(self, attempt: Attempt) -> bool | None:
        """Refuse if the host is on its way into the loaded image, whoever requested it; else return what systemd says.

        That is False, or None if systemd does not say.
        """
        down = await attempt.goes_down()
        if down:
            raise Refused(
                "The host is on its way into the next kernel",
                where="abort",
                remedy="Wait for it; systemctl list-jobs shows it.",
            )
        return down

    async def check_may_be_called_back(self, attempt: Attempt, *, force: bool) -> None:
        """Raise Refused if the jump may still happen; with `force` it may be undone if systemd does not say."""
        self.refuse_in_kernel()
        if await self.refuse_on_the_way(attempt) is None and not force:
            raise Refused(
                "systemd was asked to take the host into the next kernel, and nobody can tell whether it does",
                where="abort",
                remedy="If systemctl list-jobs shows no kexec.target: `Abort(force)`",
            )

    async def until_called_off(self, attempt: Attempt) -> None:
        """Return when systemd says that the host is not, or no longer, on its way into the kexec."""
        while await attempt.goes_down() is not False:  # noqa: ASYNC110 - systemd has to be asked
            await asyncio.sleep(WATCH_SECONDS)

    async def watch_attempt(self, attempt: Attempt) -> None:
        """Notice that the jump does not happen, and call `give_up`: the request failed, or systemd has given it up."""
        cause: KhoError = Failed(
            "systemd took the request and does not take the host down",
            where="kexec.target",
            remedy="Look at journalctl -b and systemctl list-jobs.",
        )
        try:
            await attempt.wait_executor()
        except Exception as error:  # noqa: BLE001 - any error means that the request has failed
            cause = told_error(error)
            # systemctl may fail after systemd has accepted its request; about reboot(2) systemd knows nothing.
            if attempt.immediate or not await attempt.goes_down():
                await self._give_up(cause)
                return
        while self._transaction.phase is Phase.executing and not self.going_down:
            await asyncio.sleep(max(WATCH_SECONDS, self._settings.current.deadlines.execute))
            if self._transaction.phase is Phase.executing and await attempt.goes_down() is False:
                await self._give_up(cause)
                return
