# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of the LUO sessions that khod makes for producers."""

PREFIX = "khod-"


def session_of(run: str, producer: str) -> str:
    """Return the name of a producer's session in a handover.

    The name has a hash, because the kernel takes 63 bytes and a producer's name may have more.
    """
    import hashlib  # noqa: PLC0415 - it takes long, and a host at rest has no session

    return f"{PREFIX}{run}-{hashlib.sha256(producer.encode()).hexdigest()[:16]}"
