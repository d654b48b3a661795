# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's state, read in a thread of its own: a question that hangs must not delay an undo."""

from collections.abc import Callable

from khod.errors import Failed, KhoError, Unsupported
from khod.handover import reconcile
from khod.kernel.kexec import Kexec
from khod.kernel.probe import Probed
from khod.kernel.protocol import KhoKernel
from khod.kernel.thread import Workers
from khod.model import Observed


class Observer:
    """The kernel's generation, probed until it is known, and the kernel's state, read anew each time."""

    def __init__(self, kexec: Kexec, prober: Callable[[], Probed], workers: Workers) -> None:
        self.probed = Probed(None, "not yet probed", "")
        self.last: Observed | None = None
        """The kernel's state when it was last read."""
        self._kexec = kexec
        self._prober = prober
        self._workers = workers

    @property
    def require_kernel(self) -> KhoKernel:
        """The kernel's KHO; raises Unsupported if it has none."""
        if self.probed.kernel is None:
            raise Unsupported(self.probed.what, remedy=self.probed.remedy)
        return self.probed.kernel

    @property
    def require_last(self) -> Observed:
        """The kernel's state when it was last read, which it was."""
        assert self.last is not None, "the kernel was asked before"
        return self.last

    async def observe_kernel(self, deadline: float) -> Observed:
        """Return the kernel's state; Failed if it cannot be read within `deadline` seconds."""

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
        """Return the kernel's state, or None if it cannot be read: an undo continues without it."""
        try:
            return await self.observe_kernel(deadline)
        except KhoError:
            return None
        except Exception:  # noqa: BLE001 - whatever is in the kernel's files, an undo continues
            return None
