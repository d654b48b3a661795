# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verify the files of the next kernel as they were given, and hold them to policy: [images] in khod.toml.

This comes before khod unpacks anything of them. Each file is in sealed memory by then: what is verified here is what is
unpacked and loaded.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from khod.concurrency.worker import Worker
from khod.config import Images
from khod.dataclass import dataclass
from khod.errors import KhoError, Refused
from khod.history.model import FileOrigin, Signer
from khod.images.sealed import Sealed
from khod.producers.commands import CommandRunner
from khod.provenance import keys as trusted
from khod.provenance.keys import COMMENT, TrustedKeys
from khod.provenance.minisign import verify_minisign
from khod.provenance.openpgp import verify_openpgp

PINS = "images.sha256"
KHOD_TOML = "/etc/kho/khod.toml"


@dataclass(frozen=True)
class TakenFile:
    """A file of a request, in sealed memory, with its detached signatures; the object owns them.

    `unusable` has an error for each signature that could not be read. With `must_be_signed` the caller asks for a good
    one, whatever policy says.
    """

    role: str
    file: Sealed
    signatures: tuple[Sealed, ...] = ()
    unusable: tuple[Refused, ...] = ()
    must_be_signed: bool = False

    def close_signatures(self) -> None:
        """Free the memory of the signatures."""
        for signature in self.signatures:
            signature.close()


@dataclass(frozen=True)
class _Findings:
    """What was found of one file: who has signed it, which signatures are not good, which were not looked at."""

    signers: list[Signer]
    bad: list[KhoError]
    unverified: list[str]


async def verify_files(
    root: Path, runner: CommandRunner, worker: Worker, files: Sequence[TakenFile], policy: Images, pins: Sequence[str]
) -> list[FileOrigin]:
    """Return what is known of each file, with what policy has against it.

    `root` holds etc/kho/keys.d, `runner` runs gpgv, and what takes long is done in `worker`. `pins` are digests that
    the caller names: each file must have one of them, besides what policy asks for.
    """
    return [await _verify_file(root, runner, worker, one, policy, pins) for one in files]


async def _verify_file(
    root: Path, runner: CommandRunner, worker: Worker, taken: TakenFile, policy: Images, pins: Sequence[str]
) -> FileOrigin:
    required = find_requirement(policy, taken.role)
    digest = await worker.call_within(lambda: taken.file.sha256, "hashing the file", None)
    pinned_by = [who for who, digests in ((PINS, policy.sha256), ("the caller", pins)) if digest in digests]
    pinned = PINS in pinned_by
    must = taken.must_be_signed or required in ("signature", "both") or (required == "either" and not pinned)
    found = await _verify_signatures(root, runner, worker, taken, must=must)
    refusal = _find_refusal(taken, required, found, digest, pins, pinned=pinned, must=must)
    doubts = [] if refusal is not None else [error.what for error in found.bad]
    return FileOrigin(
        taken.role,
        taken.file.name,
        digest,
        taken.file.size,
        time.time(),
        pinned_by,
        found.signers,
        "" if refusal is None else refusal.what,
        "" if refusal is None else refusal.remedy,
        doubts,
        found.unverified,
    )


def _find_refusal(
    taken: TakenFile,
    required: str,
    found: _Findings,
    digest: str,
    pins: Sequence[str],
    *,
    pinned: bool,
    must: bool,
) -> Refused | None:
    """Return what policy, or the caller, has against a file, None for nothing; with `must` it must be signed."""
    name = taken.file.name
    if pins and digest not in pins:
        return Refused(
            f"{name} is not the file that was asked for: its SHA-256 is {digest}, which is not among those of `sha256`",
            remedy="Get the right file, or correct `sha256`.",
        )
    unpinned = Refused(
        f"The SHA-256 of {name} is {digest}, which is not pinned in images.sha256 of {KHOD_TOML}",
        remedy="If this is the file that you mean, add its digest there; if not, get the right file.",
    )
    if required in ("digest", "both") and not pinned:
        return unpinned
    if found.signers or not must:
        return None
    unsigned = _unsigned_error(taken, found)
    if required == "either" and not pinned:
        return Refused(f"{unpinned.what}. {unsigned.what}", remedy=unsigned.remedy)
    return unsigned


def find_requirement(policy: Images, role: str) -> str:
    """Return what policy requires of a file of this role: none, digest, signature, either or both."""
    required = policy.require if role == "kernel" or policy.require_initrd == "same" else policy.require_initrd
    is_explicit = role != "kernel" and policy.require_initrd == "none"
    return "digest" if required == "none" and policy.sha256 and not is_explicit else required


async def _verify_signatures(
    root: Path, runner: CommandRunner, worker: Worker, taken: TakenFile, *, must: bool
) -> _Findings:
    """Verify every signature of a file. A host without keys looks at none, unless one must be good."""
    found = _Findings([], list(taken.unusable), [])
    if not taken.signatures:
        return found
    try:
        keys = await worker.call_within(partial(trusted.load_keys, root), "reading the keys", None)
    except KhoError as error:  # ConfigError
        found.bad.append(Refused(f"{error.what} ({error.where})", remedy=error.remedy))
        return found
    if not keys and not must:
        found.unverified.extend(signature.name for signature in taken.signatures)
        return found
    for signature in taken.signatures:
        try:
            found.signers.extend(await _verify_one(runner, worker, taken.file, signature, keys))
        except KhoError as error:
            found.bad.append(error)
    return found


async def _verify_one(
    runner: CommandRunner, worker: Worker, file: Sealed, signature: Sealed, keys: TrustedKeys
) -> list[Signer]:
    """Return who has made a signature; Refused if it is not good. Its first bytes say of what kind it is."""
    if bytes(signature.view()[: len(COMMENT)]) == COMMENT:
        verifying = partial(verify_minisign, file, signature, keys.ed25519, keys.directory)
        return [await worker.call_within(verifying, "verifying the signature", None)]
    return await verify_openpgp(runner, file, signature, keys)


def _unsigned_error(taken: TakenFile, found: _Findings) -> Refused:
    """Return what is said of a file without a good signature."""
    if found.bad:
        return Refused("; ".join(error.what for error in found.bad), remedy=found.bad[0].remedy)
    return Refused(
        f"{taken.file.name} has no signature, which [images] in {KHOD_TOML} requires",
        remedy="Put a detached signature beside each file, as FILE.asc, .sig, .gpg or .minisig, or name it with "
        "`kernel.signature` or `kernel.initrd_signature`.",
    )
