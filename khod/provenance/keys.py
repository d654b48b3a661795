# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys that this host trusts: the files of /etc/kho/keys.d.

NAME.asc, NAME.gpg and NAME.pgp have OpenPGP keys, with armor or without; NAME.pub has a key of minisign or signify.
"""

import base64
import binascii
import os
import re
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from khod.dataclass import dataclass
from khod.errors import ConfigError, UsageError, errno_text
from khod.files import list_names, open_regular
from khod.provenance.packets import Keys, add_keys, join_keys

DIRECTORY = "etc/kho/keys.d"
OPENPGP_SUFFIXES = (".asc", ".gpg", ".pgp")
MINISIGN_SUFFIX = ".pub"
MAX_KEY_BYTES = 4 << 20
"""The maximum size of one file: a keyring of a distribution has 60 KiB."""
ARMORED = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[^\n]*\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)
COMMENT = b"untrusted comment:"
ED25519_KEY_BYTES = 42


@dataclass(frozen=True)
class Ed25519Key:
    """A key of minisign or signify: its number, the key itself, and the name of its file."""

    number: bytes
    key: bytes
    name: str
    text: str
    """The key as minisign prints it, in Base64."""


@dataclass(frozen=True)
class TrustedKeys:
    """All keys of the directory: those of OpenPGP as one keyring, without armor, each key once."""

    directory: str
    openpgp: bytes = b""
    ed25519: tuple[Ed25519Key, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.openpgp or self.ed25519)


def load_keys(root: Path) -> TrustedKeys:
    """Read every key below `root`; none if the directory is not there.

    Raises ConfigError for the first file that has no key: what an operator has put there is meant to count.
    """
    openpgp: Keys = {}
    ed25519 = []
    for path in list_keys(root):
        if path.suffix in OPENPGP_SUFFIXES:
            _add_openpgp(openpgp, path)
        else:
            ed25519.append(_read_ed25519(path))
    return TrustedKeys(str(root / DIRECTORY), join_keys(openpgp), tuple(ed25519))


def list_keys(root: Path) -> list[Path]:
    """Return the files of the directory that have keys, by name; ConfigError if it cannot be read."""
    directory = root / DIRECTORY
    names = list_names(directory, "trusted key")
    with suppress(FileNotFoundError):
        _check_mode(os.stat(directory), directory)
    paths = [directory / name for name in names if not name.startswith(".")]
    return [path for path in paths if path.suffix in (*OPENPGP_SUFFIXES, MINISIGN_SUFFIX)]


def check_key(path: Path) -> None:
    """Raise ConfigError if a file does not have the key that its name says."""
    if path.suffix == MINISIGN_SUFFIX:
        _read_ed25519(path)
    else:
        _add_openpgp({}, path)


def _check_mode(status: os.stat_result, path: Path) -> None:
    """Raise ConfigError where every user may write a key: then anyone may choose the next kernel."""
    if status.st_mode & stat.S_IWOTH:
        remedy = f"Run: chmod o-w {shlex.quote(str(path))}"
        raise ConfigError("Every user may write here", where=str(path), remedy=remedy)


def _read_file(path: Path) -> bytes:
    try:
        with open(open_regular(str(path), "key"), "rb") as file:
            _check_mode(os.fstat(file.fileno()), path)
            content = file.read(MAX_KEY_BYTES + 1)
    except UsageError as error:
        raise ConfigError(
            error.what, where=str(path), remedy="Make it a file that root can read, or remove it."
        ) from None
    except OSError as error:
        raise ConfigError(f"The key cannot be read: {errno_text(error)}", where=str(path)) from None
    if len(content) > MAX_KEY_BYTES:
        raise ConfigError(f"The key has more than {MAX_KEY_BYTES} bytes", where=str(path), remedy="Split the keyring.")
    return content


def _add_openpgp(keys: Keys, path: Path) -> None:
    """Add the keys of a file; gpgv reads no armor."""
    content = _read_file(path)
    try:
        add_keys(keys, b"".join(map(_remove_armor, ARMORED.findall(content))) or content)
    except ValueError as error:  # binascii.Error too
        raise ConfigError(
            f"This is not a file of OpenPGP public keys: {error}",
            where=str(path),
            remedy=f"Write it with: gpg --export FINGERPRINT > {shlex.quote(str(path))}",
        ) from None


def _remove_armor(block: bytes) -> bytes:
    """Decode the lines between the header, which ends at an empty line, and the checksum, which begins with `=`."""
    lines = [line.strip() for line in block.splitlines()]
    begin = lines.index(b"") + 1 if b"" in lines else 0
    return base64.b64decode(b"".join(line for line in lines[begin:] if not line.startswith(b"=")), validate=True)


def _read_ed25519(path: Path) -> Ed25519Key:
    lines = [line.strip() for line in _read_file(path).splitlines()]
    text, *others = [line for line in lines if line and not line.startswith(COMMENT)] or [b""]
    try:
        packed = base64.b64decode(text, validate=True)
    except binascii.Error:
        packed = b""
    if len(packed) != ED25519_KEY_BYTES or packed[:2] != b"Ed" or others:
        raise ConfigError(
            f"There is {'more than one key' if others else 'no public key of minisign or signify'} in this file",
            where=str(path),
            remedy="Copy the file with the public key that minisign -G, or signify -G, has written.",
        )
    return Ed25519Key(packed[2:10], packed[10:], path.name, text.decode())
