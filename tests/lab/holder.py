# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a guest: a producer of files, NAME=BYTES each; it takes back what it left, and then hands it over again."""

import os
import random
import signal
import sys

import systemd.daemon

from khod.producer import Producer, Step

PERIOD_BYTES = 1 << 20


def file_content(name: str, size: int) -> bytes:
    """Return the content of a file: at most PERIOD_BYTES at random, the same for each file of this name, repeated."""
    period = random.Random(name).randbytes(min(size, PERIOD_BYTES))
    return (period * -(-size // len(period)))[:size]


def make_files(words: list[str]) -> dict[str, int]:
    """Return memfds with their names, one for each NAME=BYTES."""
    files = {}
    for name, _, size in (word.partition("=") for word in words):
        files[name] = os.memfd_create(name)
        os.pwrite(files[name], file_content(name, int(size)), 0)
    return files


def main() -> None:
    files: dict[str, int] = {}

    def prepare(_step: Step) -> dict[str, int]:
        return dict(files)

    def restore(step: Step) -> None:
        files.update(step.files)

    Producer("holder", prepare=prepare, restore=restore).start()
    if not files:
        files.update(make_files(sys.argv[1:]))
    systemd.daemon.notify("READY=1")
    signal.pause()


if __name__ == "__main__":
    main()
