# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys and signatures by the programs that operators use: gpg, minisign, signify."""

import os
import subprocess
from pathlib import Path

KEY_MADE = "20240101T000000!"
"""The time at which keys are made; an expired one was good for a month from then."""
SIGNED = "20240110T000000!"
SIGNED_AT = 1704844800.0


def run_program(*words: str | Path, home: Path | None = None, text: str | None = None) -> str:
    """Run a program that must succeed; return what it wrote."""
    environment = {**os.environ, **({} if home is None else {"GNUPGHOME": str(home)})}
    done = subprocess.run([*map(str, words)], env=environment, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Gpg:
    """A directory of gpg's with keys; `close` ends its agent."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.chmod(0o700)
        self.fingerprints: dict[str, str] = {}

    def run(self, *words: str | Path, at: str | None = None, text: str | None = None) -> str:
        time = ("--faked-system-time", at) if at else ()
        return run_program("gpg", "--batch", "--quiet", "--yes", *time, *words, home=self._home, text=text)

    def make_key(self, name: str, expires: str = "never") -> str:
        """Make a key with this name, with an e-mail address, in its user ID; return its fingerprint."""
        user = f"{name} <{name}@example.org>"
        self.run("--passphrase", "", "--quick-gen-key", user, "ed25519", "sign", expires, at=KEY_MADE)
        listed = self.run("--with-colons", "--list-keys", name).splitlines()
        self.fingerprints[name] = next(line.split(":")[9] for line in listed if line.startswith("fpr"))
        return self.fingerprints[name]

    def revoke(self, name: str) -> None:
        """Revoke a key with the certificate that gpg has made with it; a colon keeps that from use by mistake."""
        certificate = self._home / f"openpgp-revocs.d/{self.fingerprints[name]}.rev"
        self.run("--import", text=certificate.read_text().replace(":-----BEGIN", "-----BEGIN"))

    def export(self, path: Path, *names: str, armor: bool = False) -> None:
        """Write public keys to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run("--output", path, *(("--armor",) if armor else ()), "--export", *names)

    def sign(self, name: str, file: Path, signature: Path, *options: str, way: str = "--detach-sign") -> Path:
        """Sign a file."""
        self.run("--local-user", name, "--output", signature, *options, way, file, at=SIGNED)
        return signature

    def close(self) -> None:
        run_program("gpgconf", "--kill", "all", home=self._home)


def make_minisign_key(directory: Path, name: str) -> Path:
    """Make a key of minisign's, NAME.pub and NAME.key; return the public one."""
    public = directory / f"{name}.pub"
    run_program("minisign", "-G", "-W", "-f", "-p", public, "-s", directory / f"{name}.key")
    return public


def sign_minisign(key: Path, file: Path, signature: Path, *options: str) -> Path:
    """Sign a file with the secret key beside this public one."""
    run_program("minisign", "-S", *options, "-s", key.with_suffix(".key"), "-m", file, "-x", signature)
    return signature


def make_signify_key(directory: Path, name: str) -> Path:
    """Make a key of signify's, NAME.pub and NAME.sec; return the public one."""
    public = directory / f"{name}.pub"
    run_program("signify-openbsd", "-G", "-n", "-p", public, "-s", directory / f"{name}.sec")
    return public


def sign_signify(key: Path, file: Path, signature: Path) -> Path:
    """Sign a file with the secret key beside this public one."""
    run_program("signify-openbsd", "-S", "-s", key.with_suffix(".sec"), "-m", file, "-x", signature)
    return signature
