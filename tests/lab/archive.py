"""Debian's archive, as the lab uses it: one mirror, signed, and never the host's own apt configuration."""

from __future__ import annotations

import os

MIRROR = os.environ.get("KHO_LAB_MIRROR", "http://mirror.example/debian")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# A mirror may be a frozen copy whose index has run out; the signature still has to be right.
STALE_INDEX = 'Acquire::Check-Valid-Until "false"'


def source(kind: str, suite: str, components: str = "main") -> str:
    """One line of sources.list: `kind` is deb or deb-src."""
    return f"{kind} [signed-by={KEYRING}] {MIRROR} {suite} {components}"
