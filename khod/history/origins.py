# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of who made the files of a next kernel, in words."""

import time

from khod.history.model import FileOrigin, Signer


def describe_origin(origin: FileOrigin) -> str:
    """Return the name of a file, its digest, and who vouches for it."""
    return f"{origin.name}: SHA-256 {origin.digest}, {describe_proofs(origin)}"


def describe_proofs(origin: FileOrigin) -> str:
    """Return who vouches for a file: who has pinned its digest, and who has signed it."""
    proofs = [f"pinned by {' and '.join(origin.pinned_by)}"] if origin.pinned_by else []
    proofs += [f"signed by {_describe_signer(signer)}" for signer in origin.signers]
    proofs += [f"{name} was not verified (no keys in /etc/kho/keys.d)" for name in origin.unverified]
    proofs = proofs or ["neither pinned nor signed"]
    return ", ".join([*proofs, "against the policy of this host"] if origin.refusal else proofs)


def _describe_signer(signer: Signer) -> str:
    """Return who signed, with which key, when, and what has verified that."""
    day = f" on {time.strftime('%Y-%m-%d', time.gmtime(signer.signed_at))}" if signer.signed_at else ""
    return f"{signer.name} ({signer.method} {signer.key}){day}, verified by {signer.verifier}"
