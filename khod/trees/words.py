"""Sizes, counts, names and bytes as they are said of a tree."""

VERSION = "-v"  # separates a compatible's family from its version
HEAD = 32  # bytes shown of what cannot be decoded
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
MARK = "(!)"
"""Stands in every line about something that is not as it should be."""


def human(size: int) -> str:
    """A size in bytes in the largest unit it reaches, with at most one decimal."""
    if size < 1 << 10:
        return counted(size, "byte")
    unit = min((size.bit_length() - 1) // 10, len(UNITS) - 1)
    scaled = size / (1 << 10 * unit)
    return f"{scaled:.0f} {UNITS[unit]}" if scaled == int(scaled) else f"{scaled:.1f} {UNITS[unit]}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: `1 range`, `2 ranges`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def hexadecimal(raw: bytes | memoryview) -> str:
    """The bytes as hex in groups, cut after HEAD of them."""
    return f"{bytes(raw[:HEAD]).hex(' ')}{' ...' if len(raw) > HEAD else ''}" or "nothing"


def printable(name: str) -> str:
    """A name as it may stand on a terminal: what is not printable is escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def family(compatible: str) -> str:
    """A compatible without its version: `kho` of `kho-v4`."""
    return compatible.rpartition(VERSION)[0] or compatible
