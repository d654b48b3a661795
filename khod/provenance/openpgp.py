# SPDX-License-Identifier: LGPL-2.1-or-later
"""OpenPGP signatures, verified by gpgv(1).

gpgv and not sqv(1): gpgv tells programs what it found (--status-fd, doc/DETAILS of GnuPG; seen on 2.2.40 and 2.4.9),
with the user ID of the key. Of sqv only a text for people says why a signature is not good; and it takes a key that has
expired for good where the signature was made before (seen on 1.1.0 and 1.5.0), which is not what an operator expects of
a key that is not to be used any more.
"""

import asyncio
import fcntl
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from urllib.parse import unquote

from khod.concurrency.bounded import CUT_SECONDS, run_within, settle_task
from khod.dataclass import dataclass
from khod.errors import Refused
from khod.history.model import Signer
from khod.images.sealed import Sealed, seal_pieces
from khod.producers.commands import CANNOT_START, Command, CommandRunner, RunningCommand
from khod.producers.execution import describe_end
from khod.provenance.keys import TrustedKeys
from khod.systemd.setting_values import Property
from khod.text import one_line

PATH = "/usr/local/bin:/usr/bin:/bin"
GPGV = "gpgv"
UNIT_PREFIX = "kho-gpgv-"
VERIFY_SECONDS = 120.0
"""How long one signature may take: gpgv hashes the file once."""
MAX_OUTPUT_BYTES = 64 << 10
STATUS = "[GNUPG:] "
CLASS_AT = 8
"""The place of a signature's class among the words of VALIDSIG."""
BINARY_SIGNATURE = "00"
"""The class of a signature of the bytes of a file; that of a text (01) is good also where line ends were changed."""
DONE = (0, 1, 2)
"""Exit codes after which gpgv has said what it found, with all but 0 of a signature that is not good."""
CAP_SYS_PTRACE = 19
SETTINGS: Mapping[str, Property] = {
    # It reads khod's sealed files at /proc/PID/fd, which is what a debugger may do, and needs nothing else.
    "CapabilityBoundingSet": ("t", 1 << CAP_SYS_PTRACE),
    "NoNewPrivileges": ("b", True),
    "PrivateNetwork": ("b", True),
    "ProtectSystem": ("s", "strict"),
    "ProtectHome": ("s", "yes"),
}
"""Of the unit in which gpgv runs. It does not need much: whoever gets the better of gpgv may choose the next kernel."""


@dataclass(frozen=True)
class _Found:
    """What gpgv has said of one signature: each keyword of its lines, with the words after it."""

    lines: Mapping[str, list[str]]

    def words(self, keyword: str) -> list[str]:
        """Return the words after a keyword, none if gpgv has not said it."""
        return self.lines.get(keyword, [])

    @property
    def is_good(self) -> bool:
        """Whether it is a good signature of the bytes, by a key that has neither expired nor been revoked."""
        valid = self.words("VALIDSIG")
        return "GOODSIG" in self.lines and valid[CLASS_AT : CLASS_AT + 1] == [BINARY_SIGNATURE]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the primary key, as far as gpgv knows the key; else of what has signed."""
        if words := self.words("VALIDSIG") or self.words("ERRSIG"):
            return words[-1] if words[-1] != "-" else words[0]  # "-": gpgv knows the number of the key alone
        return next(iter(self.words("BADSIG")), "unknown")

    @property
    def user_id(self) -> str:
        """The user ID of the key, "" if it is not known."""
        kinds = ("GOODSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "BADSIG")
        words = next((self.lines[kind] for kind in kinds if kind in self.lines), [])
        return one_line(unquote(" ".join(words[1:]), errors="replace"))

    @property
    def key(self) -> str:
        """The key for people."""
        return f"{self.fingerprint}, {self.user_id}" if self.user_id else self.fingerprint


async def verify_openpgp(runner: CommandRunner, data: Sealed, signature: Sealed, keys: TrustedKeys) -> list[Signer]:
    """Return who has signed `data`; Refused if no signature is good, or if gpgv cannot be run or does not end.

    The very memory that is loaded later is what gpgv reads.
    """
    if not keys.openpgp:
        raise Refused(
            f"There is no OpenPGP key in {keys.directory}, by which {signature.name} could be verified",
            remedy=f"Put the public keys that you trust there: gpg --export FINGERPRINT > {keys.directory}/NAME.gpg",
        )
    with seal_pieces([keys.openpgp], "keyring") as keyring:
        argv = [GPGV, "--status-fd", "1", "--weak-digest", "SHA1", "--weak-digest", "RIPEMD160"]
        argv += ["--keyring", _path_of(keyring), "--", _path_of(signature), _path_of(data)]
        try:
            code, output, errors = await run_within(VERIFY_SECONDS, _run_program(runner, argv))
        except TimeoutError:
            raise Refused(
                f"gpgv has not verified {signature.name} within {VERIFY_SECONDS:g} s",
                remedy=_manual_remedy(data, signature, keys.directory),
            ) from None
        except (OSError, ValueError) as error:
            raise Refused(
                f"gpgv cannot be started: {one_line(str(error))}",
                remedy="Try again; if this stays so, look at: journalctl -b -u kho-handover",
            ) from None
    if code in CANNOT_START:
        raise Refused("gpgv is not installed, which verifies it", remedy="Install it: apt-get install gpgv")
    found = _parse_status(output)
    good = [one for one in found if one.is_good]
    if not good or code not in DONE or any("BADSIG" in one.lines for one in found):
        # The most telling of several: what was found of a key that is known.
        worst = min(found, key=lambda one: ("BADSIG" not in one.lines, "NO_PUBKEY" in one.lines), default=None)
        raise _bad_signature_error(worst, code, errors, data, signature, keys.directory)
    return [Signer("openpgp", one.fingerprint, one.user_id, GPGV, _read_time(one.words("VALIDSIG")[2])) for one in good]


def _path_of(file: Sealed) -> str:
    """Return a path at which another process of this host can open the file again, and read it from its beginning."""
    return f"/proc/{os.getpid()}/fd/{file.fd}"


async def _run_program(runner: CommandRunner, argv: Sequence[str]) -> tuple[int | None, str, str]:
    """Run a program to its end: return its exit code, what it has written, and the last line of its errors."""
    environment = {"PATH": PATH, "KHO_VERB": "signature", "LC_ALL": "C"}
    command = Command(uuid.uuid4().hex[:12], argv, environment, SETTINGS, UNIT_PREFIX)
    with ExitStack() as stack:
        out, errors = (_open_output(stack) for _ in range(2))
        running = await runner.start_command(command, out, errors)
        try:
            code = await running.wait_end()
        finally:
            await settle_task(asyncio.ensure_future(_end_program(running)), CUT_SECONDS)
        lines = [line for line in _read_output(errors).splitlines() if line.strip()]
        return code, _read_output(out), one_line(lines[-1]) if lines else ""


async def _end_program(running: RunningCommand) -> None:
    await running.end()


def _open_output(stack: ExitStack) -> int:
    """Return a file in memory for an output. It cannot grow: what writes more than fits gets an error."""
    fd = os.memfd_create("khod-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    os.ftruncate(fd, MAX_OUTPUT_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _read_output(fd: int) -> str:
    return os.pread(fd, MAX_OUTPUT_BYTES, 0).rstrip(b"\0").decode(errors="replace")


def _parse_status(output: str) -> list[_Found]:
    """Return what gpgv has said of each signature; other lines are left out."""
    found: list[dict[str, list[str]]] = []
    for line in output.split("\n"):
        keyword, *words = line.removeprefix(STATUS).split(" ")
        if line.startswith(STATUS) and keyword == "NEWSIG":
            found.append({})
        elif line.startswith(STATUS) and found:
            found[-1].setdefault(keyword, words)
    return [_Found(lines) for lines in found]


def _read_time(text: str) -> float | None:
    """Return a time of a status line in seconds since the epoch; None for 0, which is none."""
    return (float(text) or None) if text.isdecimal() else None


def _format_day(words: list[str]) -> str:
    seconds = _read_time(words[0]) if words else None
    return time.strftime(" on %Y-%m-%d", time.gmtime(seconds)) if seconds else ""


def _bad_signature_error(
    found: _Found | None, code: int | None, errors: str, data: Sealed, signature: Sealed, directory: str
) -> Refused:
    """Return what is said of a signature that is not good."""
    name = signature.name
    again = "Get the file and its signature again, both from the same place."
    said = f": {errors.removeprefix('gpgv: ')}" if errors else ""
    if code not in DONE:
        return Refused(
            f"gpgv has not verified {name}: {describe_end(code)}{said}",
            remedy=_manual_remedy(data, signature, directory),
        )
    if found is None:
        return Refused(f"{name} is not a detached signature that gpgv can read{said}", remedy=again)
    if "BADSIG" in found.lines:
        return Refused(
            f"{name} is not the signature of {data.name}: the file was changed, or it is that of another one "
            f"(key {found.key})",
            remedy=again,
        )
    if "REVKEYSIG" in found.lines or "KEYREVOKED" in found.lines:
        return Refused(
            f"The key that made {name} was revoked: {found.key}",
            remedy=f"Do not use {data.name}, unless its maker has signed it again with another key.",
        )
    if "EXPKEYSIG" in found.lines:
        return Refused(
            f"The key that made {name} has expired{_format_day(found.words('KEYEXPIRED'))}: {found.key}",
            remedy=f"If its owner has given it more time, put the new copy of the key into {directory}; otherwise have "
            "the file signed with another key.",
        )
    if "EXPSIG" in found.lines:
        return Refused(
            f"The signature {name} has expired{_format_day(found.words('VALIDSIG')[3:4])}: {found.key}",
            remedy="Have the file signed again.",
        )
    if "NO_PUBKEY" in found.lines:
        return Refused(
            f"The signature {name} was made by a key that is not in {directory}: {found.key}",
            remedy=f"If you trust this key, put it there: gpg --export {found.fingerprint} > {directory}/NAME.gpg. "
            f"If not, do not use {data.name}.",
        )
    if "GOODSIG" in found.lines and "VALIDSIG" in found.lines:
        return Refused(
            f"{name} is the signature of a text, which does not say that no byte was changed: {found.key}",
            remedy="Have the file signed with: gpg --detach-sign FILE",
        )
    return Refused(f"gpgv cannot verify {name}{said} (key {found.key})", remedy="Have the file signed again.")


def _manual_remedy(data: Sealed, signature: Sealed, directory: str) -> str:
    return f"Try it by hand: gpgv --keyring {directory}/NAME.gpg {signature.name} {data.name}"
