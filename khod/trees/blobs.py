# SPDX-License-Identifier: LGPL-2.1-or-later
"""A producer's blob as a node: most are an FDT, since Linux 7.0 some are a C structure, others are unknown."""

import struct
from collections.abc import Mapping

from khod.abi import fdt
from khod.abi.fdt import Node
from khod.errors import MalformedTree

METADATA, LUO = "kexec-metadata", "LUO"
KHO_KEXEC_METADATA = struct.Struct("=I65sI")  # version, previous_release, kexec_count; include/linux/kho/abi
METADATA_VERSION = 1
LUO_SER = struct.Struct("=8sQQQ")  # compatible, liveupdate_num, sessions_pa, flbs_pa; luo-v3 to luo-v5
CUT = (
    "debugfs shows as much of it as there was when the file was made (seen on Linux 6.19 and 7.3); "
    "the kernel hands over all of it"
)
FREED = "The kernel gives LUO's page back once it has read it (seen on Linux 7.3): anything may stand there by now"
HIDDEN = (
    "debugfs shows no root in a kernel that was itself reached by a handover (seen on Linux 6.19 and 7.3); "
    "the kernel hands one over all the same"
)


def open_blob(name: str, blob: bytes) -> Node:
    """Read a blob as a node; "" names the root, which is always an FDT. MalformedTree if its format is not known.

    The error has a remedy if a healthy kernel may show such a blob. A structure is returned as one node whose
    properties are its members.
    """
    if name and blob[: fdt.U32.size] != fdt.U32.pack(fdt.MAGIC):
        view = memoryview(blob)
        if (
            name == METADATA
            and len(blob) == KHO_KEXEC_METADATA.size
            and blob[:4] == struct.pack("=I", METADATA_VERSION)
        ):
            members = {"version": view[:4], "previous_release": _text_of(view[4:69]), "kexec_count": view[69:]}
            return Node(METADATA, members)
        if blob.startswith(b"luo-v") and len(blob) == LUO_SER.size:
            numbers = {
                key: view[at : at + 8] for at, key in ((8, "liveupdate_num"), (16, "sessions_pa"), (24, "flbs_pa"))
            }
            return Node(name, {"compatible": _text_of(view[:8])} | numbers)
        raise MalformedTree(
            "It is neither an FDT nor a structure we know", where=name, remedy=f"{FREED}." if name == LUO else ""
        )
    if not name and not blob:
        raise MalformedTree("There is no root", remedy=f"On a running kernel this is expected: {HIDDEN}.")
    try:
        return fdt.parse_tree(blob, name)
    except MalformedTree as error:
        if not name and fdt.missing_size(blob):
            error.remedy = f"On a running kernel this is expected: {CUT}."
        raise


def is_broken(name: str, blob: bytes) -> bool:
    """Whether a blob that cannot be read should be an FDT; any other producer's blob may have any format."""
    return not name or blob.startswith(fdt.U32.pack(fdt.MAGIC))


def is_damaged(blobs: Mapping[str, bytes], *, shortened: bool = False) -> bool:
    """Whether a blob that should be an FDT cannot be read.

    With `shortened`, what a healthy kernel may show in debugfs is accepted.
    """
    for name, blob in blobs.items():
        try:
            open_blob(name, blob)
        except MalformedTree as error:
            if is_broken(name, blob) and not (shortened and error.remedy):
                return True
    return False


def _text_of(member: memoryview) -> memoryview:
    """Return a char array up to its first NUL, which is included as in a property."""
    return member[: bytes(member).find(b"\0") + 1] or member
