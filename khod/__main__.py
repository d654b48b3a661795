# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start khod: python -m khod, and /usr/bin/khod.

After a jump, producers wait for it: the early restore comes first, and what can be left out of the rest is.
"""

import gc
import os
import sys
from collections.abc import Mapping

gc.disable()  # until khod is ready: nothing of what is imported becomes garbage
from khod.early.kernel import HostKernel  # noqa: E402
from khod.early.restore import EarlyRestore, begin_early_restore  # noqa: E402
from khod.handover.directory import STATE  # noqa: E402
from khod.systemd.passed import listen_fds_by_name  # noqa: E402
from khod.wire import SOCKET  # noqa: E402

RUNTIME = os.path.dirname(SOCKET)


def main() -> None:
    """Begin the early restore where khod is started as by its unit, and run khod."""
    passed, early = listen_fds_by_name(), None
    if not sys.argv[1:]:
        early = begin_early_restore(STATE, RUNTIME, passed, HostKernel())
    run_daemon(passed, early)


def run_daemon(passed: Mapping[str, int], early: EarlyRestore | None) -> None:
    """Import the rest of khod, and run it; the arguments are those of `khod.daemon.main`."""
    sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio imports it where it can, and khod has no use for it
    import asyncio  # noqa: F401, PLC0415 - the early restore is under way

    del sys.modules["ssl"]
    from khod import daemon  # noqa: PLC0415

    daemon.main(passed, early)


if __name__ == "__main__":
    main()
