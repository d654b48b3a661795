# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the programs the lab is built with, and make a sentence of what goes wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.errors import LabError

LAST_CHARACTERS = 3000


def call(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program of the host to its end and give its standard output.

    LabError if it is not installed, or if it fails: with the command and the end of what it said on both streams.
    """
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not installed: see tests/lab/packages.txt") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-LAST_CHARACTERS:]
        raise LabError(f"{' '.join(command)[:500]}: exit status {done.returncode}\n{said}")
    return done.stdout
