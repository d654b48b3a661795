# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel says of itself: asked in a thread of its own, for a question that hangs must keep no undo waiting."""

from collections.abc import Callable

from khod.errors import Failed, KhoError, Unsupported
from khod.handover import reconcile
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import KhoKernel
from khod.kernel.thread import Workers
from khod.model import Observed


class Observer:
    """The kernel's generation, found out once, and how it stands, asked anew each time."""

    def __init__(self, kexec: Kexec, prober: Callable[[], Probed], workers: Workers) -> None:
        self.probed = Probed(None, "not yet probed", "")
        self.last: Observed | None = None
        """What the kernel said when it was asked last."""
        self._kexec = kexec
        self._prober = prober
        self._workers = workers

    @property
    def require_kernel(self) -> KhoKernel:
        """The kernel's KHO; Unsupported where it has none."""
        if self.probed.kernel is None:
            raise Unsupported(self.probed.what, remedy=self.probed.remedy)
        return self.probed.kernel

    async def observe_kernel(self, deadline: float) -> Observed:
        """Ask the kernel how it stands; Failed where it cannot be asked within `deadline` seconds."""

        def ask() -> tuple[Probed, Observed]:
            probed = self.probed if self.probed.kernel is not None else self._prober()
            return probed, reconcile.observe_kernel(self._kexec, probed.kernel)

        try:
            self.probed, observed = await self._workers.observer.call_within(ask, "saying how it stands", deadline)
        except OSError as error:
            raise Failed(f"The kernel cannot be asked: {error}", where=str(error.filename)) from error
        self.last = observed
        return observed

    async def try_observe(self, deadline: float) -> Observed | None:
        """Ask it, and do without an answer where none comes: what follows is an undo, which does not wait for it."""
        try:
            return await self.observe_kernel(deadline)
        except KhoError:
            return None
        except Exception:  # noqa: BLE001 - whatever the kernel's files say, an undo goes on
            return None
