"""The one thread every kernel call is made in.

v3's ftrace producer takes a lock at activation and drops it at abort, so both writes must come from
one long-lived thread; and a sysfs write that blocks (the kernel serializes under a mutex, without a
time limit) must never block the daemon.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from khod.errors import Failed

T = TypeVar("T")


class KernelThread:
    """Runs calls one after the other; a caller's deadline ends its waiting, never the call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kernel")

    async def call(self, function: Callable[[], T], what: str, deadline: float) -> T:
        """Return what `function` returns or raises; Failed after `deadline` seconds, the call goes on."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, function)
        try:
            return await asyncio.wait_for(asyncio.shield(future), deadline)
        except TimeoutError:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise Failed(
                f"The kernel did not come back from {what} within {deadline:g} s",
                where=what,
                remedy="The call cannot be interrupted; khoctl status shows when it has ended.",
            ) from None

    def later(self, function: Callable[[], object]) -> None:
        """Run a call after those under way, and wait for nothing; what it raises is lost."""
        self._pool.submit(function)

    def close(self) -> None:
        """Let the thread end after its last call."""
        self._pool.shutdown(wait=False)
