# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process one of whose threads sends to somebody who reads nothing."""

import os
import subprocess
import sys

from tests.unit.khods import DEADLINE, REPOSITORY

GOES_ON = "goes on\n"
PROGRAM = """
import sys, threading, time
{prepare}
sent = [0]
def send():
    while True:
        {send}
        sent[0] += 1
threading.Thread(target=send, daemon=True).start()
before = -1
while before < sent[0] or not before:
    before = sent[0]
    time.sleep(0.05)
print("goes on")
"""


def send_until_it_blocks(prepare: str, send: str, *arguments: str, **environment: str) -> str:
    """Run `send` in a thread until it blocks; return what the main thread printed, which is GOES_ON if it did go on."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(prepare=prepare, send=send), *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    ).stdout
