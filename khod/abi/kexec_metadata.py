# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blob `kexec-metadata` of KHO (Linux 7.0 and later): which kernel handed over, and how often that was done.

Each kernel writes it at boot for the next one, with its own release and with the count that it was given plus one: what
7.3.4 leaves is what arrives. include/linux/kho/abi/kexec_metadata.h has the layout.
"""

import struct

from khod.dataclass import dataclass

VERSION = 1
METADATA = struct.Struct("=I65sI")  # version, previous_release, kexec_count; packed


@dataclass(frozen=True)
class KexecMetadata:
    """The release of the kernel that wrote it, and the number of the kexec it is for, counted since the cold boot."""

    previous_release: str
    kexec_count: int


def parse_metadata(blob: bytes) -> KexecMetadata | None:
    """Parse the blob; None if it has another version or another size."""
    if len(blob) < METADATA.size:
        return None
    version, release, count = METADATA.unpack_from(blob)
    if version != VERSION:
        return None
    return KexecMetadata(release.split(b"\0")[0].decode(errors="replace"), count)
