# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts, names and bytes as they are said of a tree."""

VERSION = "-v"  # separates a compatible's family from its version
HEAD_BYTES = 32  # bytes shown of what cannot be decoded
MARK = "(!)"
"""Stands in every line about something that is not as it should be."""


def format_count(number: int, one: str, many: str = "") -> str:
    """A number of things: `1 range`, `2 ranges`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def format_hex(raw: bytes | memoryview) -> str:
    """The bytes as hex in groups, cut after HEAD of them."""
    return f"{bytes(raw[:HEAD_BYTES]).hex(' ')}{' ...' if len(raw) > HEAD_BYTES else ''}" or "nothing"


def format_family(compatible: str) -> str:
    """A compatible without its version: `kho` of `kho-v4`."""
    return compatible.rpartition(VERSION)[0] or compatible
