# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signatures of minisign and of OpenBSD's signify, verified in khod itself.

Both are Ed25519 with a few lines of text around it. The arithmetic is that of python3-cryptography; with a program
there would be one more process that must be given the bytes, and one more text that must be understood.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable

from khod.errors import Refused
from khod.history.model import Signer
from khod.images.sealed import Sealed
from khod.provenance.keys import COMMENT, Ed25519Key

SIGNATURE_BYTES = 74
TRUSTED = b"trusted comment: "
TIMESTAMP = re.compile(rb"(?:^|\t)timestamp:([0-9]{1,12})(?:\t|$)")
PREHASHED, PURE = b"ED", b"Ed"
INSTALL = "Install it: apt-get install python3-cryptography"


def verify_minisign(data: Sealed, signature: Sealed, keys: Iterable[Ed25519Key], directory: str) -> Signer:
    """Return who has signed `data`; Refused if the signature is damaged, of another file, or of an unknown key.

    This takes as long as hashing the file, and longer for a signature that is not prehashed.
    """
    packed, comment, comment_signature = _parse_signature(signature)
    number, signed = packed[2:10], packed[10:]
    found = [key for key in keys if key.number == number]
    if not found:
        raise Refused(
            f"The signature {signature.name} was made by a key that is not in {directory}: {format_number(number)}",
            remedy=f"If you trust this key, put its file there, as NAME.pub. If not, do not use {data.name}.",
        )
    message: bytes | memoryview = data.view()
    if packed[:2] == PREHASHED:
        message = hashlib.blake2b(message).digest()
    signer = next((key for key in found if _is_good(key, signed, message)), None)
    if signer is None:
        raise Refused(
            f"{signature.name} is not the signature of {data.name}: the file was changed, or it is that of another one "
            f"(key {found[0].name})",
            remedy="Get the file and its signature again, both from the same place.",
        )
    method, signed_at = "signify", None
    if comment is not None:
        if not _is_good(signer, comment_signature, signed + comment):
            raise Refused(
                f"The trusted comment in {signature.name} was changed",
                remedy="Get the signature again; the file itself is what was signed.",
            )
        method = "minisign"
        signed_at = float(stamp[1]) if (stamp := TIMESTAMP.search(comment)) else None
    return Signer(method, signer.text, signer.name, "khod", signed_at)


def format_number(number: bytes) -> str:
    """Format the number of a key as minisign does."""
    return number[::-1].hex().upper()


def _parse_signature(signature: Sealed) -> tuple[bytes, bytes | None, bytes]:
    """Return the signature with its number, the trusted comment, and the signature of both.

    signify has no trusted comment (None), and signs the file itself, never its hash.
    """
    lines = bytes(signature.view()).rstrip(b"\r\n").splitlines()
    try:
        if len(lines) not in (2, 4) or not lines[0].startswith(COMMENT):
            raise ValueError
        packed = base64.b64decode(lines[1], validate=True)
        comment, last, methods = None, b"", [PURE]
        if lines[2:]:
            if not lines[2].startswith(TRUSTED):
                raise ValueError
            comment, last = lines[2].removeprefix(TRUSTED), base64.b64decode(lines[3], validate=True)
            methods.append(PREHASHED)
        if len(packed) != SIGNATURE_BYTES or packed[:2] not in methods:
            raise ValueError
    except (ValueError, binascii.Error):
        raise Refused(
            f"{signature.name} is not a complete signature of minisign or signify", remedy="Get the signature again."
        ) from None
    return packed, comment, last


def _is_good(key: Ed25519Key, signature: bytes, message: bytes | memoryview) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - a package that only this needs
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    except ImportError:
        raise Refused("python3-cryptography is not installed, which verifies it", remedy=INSTALL) from None
    try:
        Ed25519PublicKey.from_public_bytes(key.key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
