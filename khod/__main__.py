# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start khod: python -m khod, and /usr/bin/khod. After a jump, producers wait for it, so what can be left out is."""

import gc
import sys

gc.disable()  # until khod is ready: nothing of what is imported becomes garbage
sys.modules["ssl"] = None  # type: ignore[assignment]  # asyncio imports it where it can, and khod has no use for it
import asyncio  # noqa: E402, F401

del sys.modules["ssl"]
from khod.daemon import main  # noqa: E402

if __name__ == "__main__":
    main()
