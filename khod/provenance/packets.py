# SPDX-License-Identifier: LGPL-2.1-or-later
"""The packets of OpenPGP keys (RFC 9580, 4.2), as far as the copies of a key can be merged.

gpgv takes the first copy that it finds. One from before the key was revoked, or was given more time, would hide the
newer one.
"""

from collections.abc import Iterator

PUBLIC_KEY = 6
SECRET_KEYS = (5, 7)
RANKS = {PUBLIC_KEY: 0, 13: 1, 17: 1, 14: 2}
"""The packets that begin a part of a key, in the order in which gpgv expects them: itself, user IDs, subkeys."""
MIN_TWO_OCTETS, MIN_PARTIAL, FOUR_OCTETS = 192, 224, 255

Keys = dict[bytes, dict[tuple[int, bytes], dict[bytes, None]]]
"""Each key by its contents: its parts by rank and contents, each with its packets in order: itself, its signatures."""


def add_keys(keys: Keys, content: bytes) -> None:
    """Add the public keys of a file; ValueError if it has none, has a private one, or is damaged."""
    parts: dict[tuple[int, bytes], dict[bytes, None]] | None = None
    part: dict[bytes, None] = {}
    for tag, packet, body in split_packets(content):
        if tag in SECRET_KEYS:
            raise ValueError("it has a private key")
        if tag == PUBLIC_KEY:
            parts = keys.setdefault(body, {})
        if parts is None:
            raise ValueError("it does not begin with a key")
        if tag in RANKS:
            part = parts.setdefault((RANKS[tag], body), {packet: None})
        else:
            part[packet] = None
    if parts is None:
        raise ValueError("it is empty")


def join_keys(keys: Keys) -> bytes:
    """Return a keyring with each key once."""
    return b"".join(
        packet
        for parts in keys.values()
        for _, part in sorted(parts.items(), key=lambda item: item[0][0])
        for packet in part
    )


def split_packets(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the type, the bytes and the contents of each packet."""
    at = 0
    while at < len(content):
        tag, begin, length = _read_header(content, at)
        end = begin + length
        if end > len(content):
            raise ValueError("it ends in the middle of a packet")
        yield tag, content[at:end], content[begin:end]
        at = end


def _read_header(content: bytes, at: int) -> tuple[int, int, int]:
    """Return the type of a packet, where its contents begin, and their length; ValueError if no packet begins there."""
    head, at = content[at], at + 1
    if not head & 0x80:
        raise ValueError("it has bytes outside of packets")
    if not head & 0x40:
        tag, size = (head & 0x3C) >> 2, (1, 2, 4, 0)[head & 3]
    else:
        tag, first = head & 0x3F, content[at] if at < len(content) else 0
        if MIN_TWO_OCTETS <= first < MIN_PARTIAL:
            two = content[at : at + 2].ljust(2, b"\0")
            return tag, at + 2, ((two[0] - MIN_TWO_OCTETS) << 8) + two[1] + MIN_TWO_OCTETS
        if first < MIN_TWO_OCTETS:
            size = 1
        else:
            at, size = at + 1, 4 if first == FOUR_OCTETS else 0
    if not size:
        raise ValueError("it has a packet of unknown length")
    return tag, at + size, int.from_bytes(content[at : at + size])
