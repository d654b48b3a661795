# SPDX-License-Identifier: LGPL-2.1-or-later
"""Format counts, names and bytes of a tree."""

VERSION = "-v"  # separates a compatible's family from its version
HEAD_BYTES = 32  # bytes shown of data that cannot be decoded
MARK = "(!)"
"""The mark in every line about something that is wrong."""


def format_count(number: int, one: str, many: str = "") -> str:
    """Format a number of things: `1 range`, `2 ranges`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def format_hex(raw: bytes | memoryview) -> str:
    """Format bytes in hex, cut off after HEAD_BYTES."""
    return f"{bytes(raw[:HEAD_BYTES]).hex(' ')}{' ...' if len(raw) > HEAD_BYTES else ''}" or "nothing"


def format_family(compatible: str) -> str:
    """Return a compatible without its version: `kho` of `kho-v4`."""
    return compatible.rpartition(VERSION)[0] or compatible
