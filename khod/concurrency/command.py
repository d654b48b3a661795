# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run a short command and take its output."""

import asyncio
from contextlib import suppress

from khod.concurrency.bounded import CUT_SECONDS, run_within


async def run_command(*argv: str) -> tuple[int, str]:
    """Run a command; return its exit code and its output, standard error included. A cancelled command is killed."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(TimeoutError):
                await run_within(CUT_SECONDS, process.wait())
    return process.returncode or 0, output.decode(errors="replace").strip()
