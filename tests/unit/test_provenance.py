# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who made the files of the next kernel: signatures by real keys, pinned digests, and what policy makes of them."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from khoctl.history import render_attempt
from khod.concurrency.worker import Worker
from khod.config import Images
from khod.errors import CheckFailed, ConfigError, Refused
from khod.history.model import FileOrigin
from khod.images.sealed import Sealed, seal_pieces
from khod.model import CheckResult, Phase
from khod.producers.children import Children
from khod.producers.commands import Command
from khod.producers.transient import unit_name
from khod.provenance import openpgp
from khod.provenance.keys import load_keys
from khod.provenance.packets import PUBLIC_KEY, split_packets
from khod.provenance.verify import TakenFile, find_requirement, verify_files
from khod.target.target import MAX_SIGNATURE_BYTES, Given, Request
from tests.unit.harness import Host
from tests.unit.images import CPIO, bzimage, portable
from tests.unit.signing import (
    KEY_MADE,
    SIGNED_AT,
    Gpg,
    make_minisign_key,
    make_signify_key,
    sign_minisign,
    sign_signify,
)

CONTENT = b"a kernel\r\n" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()
KEYS = "etc/kho/keys.d"
SIGNED_ONLY = Images(require="signature")


@pytest.fixture(scope="module")
def gpg() -> Iterator[Gpg]:
    """gpg with a good key, an expired one, a revoked one, and one that no host trusts; its path must be short."""
    with tempfile.TemporaryDirectory(prefix="gpg-") as name:
        made = Gpg(Path(name))
        for key in ("good", "revoked", "stranger"):
            made.make_key(key)
        made.make_key("expired", "1m")
        yield made
        made.close()


@pytest.fixture(scope="module")
def revoked(gpg: Gpg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signature that was made before its key was revoked."""
    directory = tmp_path_factory.mktemp("revoked")
    (directory / "Image").write_bytes(CONTENT)
    signature = gpg.sign("revoked", directory / "Image", directory / "Image.sig")
    gpg.revoke("revoked")
    return signature


class Site:
    """A host's root with keys, and a kernel with its signatures."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.keys = directory / KEYS
        self.keys.mkdir(parents=True)
        self.image = directory / "Image"
        self.image.write_bytes(CONTENT)
        self._worker = Worker("files", "A file")

    async def verify(
        self,
        *signatures: bytes | Path,
        policy: Images = SIGNED_ONLY,
        content: bytes = CONTENT,
        pins: Sequence[str] = (),
        role: str = "kernel",
        must_be_signed: bool = False,
    ) -> FileOrigin:
        contents = [one.read_bytes() if isinstance(one, Path) else one for one in signatures]
        sealed = [_seal(one, f"Image.{number}") for number, one in enumerate(contents)]
        with _seal(content, "Image") as file:
            taken = TakenFile(role, file, tuple(sealed), must_be_signed=must_be_signed)
            (found,) = await verify_files(self.root, Children(), self._worker, [taken], policy, pins)
        taken.close_signatures()
        return found


def _seal(content: bytes, name: str) -> Sealed:
    return seal_pieces([content], name)


@pytest.fixture
def site(tmp_path: Path, gpg: Gpg, revoked: Path) -> Site:  # noqa: ARG001 - the key is revoked before it is exported
    made = Site(tmp_path)
    gpg.export(made.keys / "vendor.gpg", "good", "expired", "revoked")
    return made


# OpenPGP


async def test_a_good_signature_tells_who_has_signed_and_when(site: Site, gpg: Gpg) -> None:
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"))
    (signer,) = found.signers
    assert (signer.method, signer.key, signer.name) == ("openpgp", gpg.fingerprints["good"], "good <good@example.org>")
    assert (signer.signed_at, signer.verifier) == (SIGNED_AT, "gpgv")
    assert (found.refusal, found.digest) == ("", DIGEST)


@pytest.mark.parametrize("suffix", ["asc", "gpg", "pgp"])
async def test_a_key_is_read_with_armor_and_without(site: Site, gpg: Gpg, suffix: str) -> None:
    (site.keys / "vendor.gpg").unlink()
    armored = site.keys / f"armored.{suffix}"
    gpg.export(armored, "good", armor=True)
    block = armored.read_bytes().replace(b"BLOCK-----\n\n", b"BLOCK-----\nComment: ours\n\n")
    armored.write_bytes(b"A comment before it.\n" + block.replace(b"\n", b"\r\n") * 2)
    signature = gpg.sign("good", site.image, site.root / "s", "--armor")
    assert (await site.verify(signature)).refusal == ""


BAD = [
    ("expired", "has expired on 2024-01-31: {expired}, expired <expired@example.org>", "more time"),
    ("stranger", "was made by a key that is not in {keys}: {stranger}", "gpg --export {stranger} > {keys}/NAME.gpg"),
    ("revoked", "was revoked: {revoked}, revoked <revoked@example.org>", "Do not use Image"),
]


@pytest.mark.parametrize(("key", "said", "remedy"), BAD, ids=[row[0] for row in BAD])
async def test_a_key_that_is_not_good_is_told_from_the_others(
    site: Site, gpg: Gpg, revoked: Path, key: str, said: str, remedy: str
) -> None:
    signature = revoked if key == "revoked" else gpg.sign(key, site.image, site.root / "s")
    found = await site.verify(signature)
    facts = {**gpg.fingerprints, "keys": site.keys}
    assert said.format_map(facts) in found.refusal
    assert "Image.0" in found.refusal
    assert remedy.format_map(facts) in found.remedy
    assert found.signers == []


async def test_a_signature_of_another_file_and_one_changed_byte_are_refused(site: Site, gpg: Gpg) -> None:
    other = site.root / "Other"
    other.write_bytes(b"another kernel")
    found = await site.verify(gpg.sign("good", other, site.root / "s"))
    assert "Image.0 is not the signature of Image" in found.refusal
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"), content=CONTENT[:-1] + b"x")
    assert "the file was changed" in found.refusal
    assert "good <good@example.org>" in found.refusal
    both = [gpg.sign("good", file, site.root / "s").read_bytes() for file in (site.image, other)]
    assert "is not the signature of Image" in (await site.verify(b"".join(both))).refusal


async def test_a_signature_that_has_expired_is_refused(site: Site, gpg: Gpg) -> None:
    found = await site.verify(gpg.sign("good", site.image, site.root / "s", "--default-sig-expire", "1d"))
    assert "The signature Image.0 has expired on 2024-01-11" in found.refusal


async def test_a_signed_message_is_no_signature_of_the_file(site: Site, gpg: Gpg) -> None:
    """gpg verifies what is in such a message, and not the file beside it."""
    for way in ("--sign", "--clear-sign"):
        found = await site.verify(gpg.sign("good", site.image, site.root / "s", way=way))
        assert "not a detached signature" in found.refusal


async def test_a_signature_of_a_text_is_refused(site: Site, gpg: Gpg) -> None:
    """It is good also for a file with other line ends."""
    signature = gpg.sign("good", site.image, site.root / "s", "--textmode")
    assert "the signature of a text" in (await site.verify(signature)).refusal
    assert "the signature of a text" in (await site.verify(signature, content=CONTENT.replace(b"\r", b""))).refusal


async def test_a_signature_with_sha1_is_refused(site: Site, gpg: Gpg) -> None:
    found = await site.verify(gpg.sign("good", site.image, site.root / "s", "--digest-algo", "SHA1"))
    assert "gpgv cannot verify Image.0: Can't check signature: Invalid digest algorithm" in found.refusal


@pytest.mark.parametrize(
    "content", [b"garbage", b"\x88\x5d\x04\x00", b"-----BEGIN PGP SIGNATURE-----\n\n????\n", CONTENT]
)
async def test_what_is_no_signature_is_refused(site: Site, content: bytes) -> None:
    found = await site.verify(content)
    assert "Image.0" in found.refusal
    assert found.signers == []


async def test_one_good_signature_among_those_of_unknown_keys_does(site: Site, gpg: Gpg) -> None:
    one, two = (gpg.sign(key, site.image, site.root / key) for key in ("stranger", "good"))
    both = one.read_bytes() + two.read_bytes()
    for signatures in ([both], [one, two], [two, one]):
        found = await site.verify(*signatures)
        assert (found.refusal, [signer.name for signer in found.signers]) == ("", ["good <good@example.org>"])


async def test_without_a_key_that_is_said(site: Site, gpg: Gpg) -> None:
    (site.keys / "vendor.gpg").unlink()
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"))
    assert found.refusal.startswith(f"There is no OpenPGP key in {site.keys}")


# gpgv that does not do what it should


GOOD = "echo '[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG A x\n[GNUPG:] VALIDSIG A 2024-01-01 1 0 4 0 22 8 00 A'"
FAKES = {
    "good, then killed": (f"{GOOD}; kill -9 $$", "gpgv has not verified Image.0: killed by SIGKILL"),
    "hangs": ("exec sleep infinity", "gpgv has not verified Image.0 within"),
    "killed": ("kill -9 $$", "gpgv has not verified Image.0: killed by SIGKILL"),
    "garbage": ("echo '[GNUPG:] GOODSIG'; echo VALIDSIG; head -c 100 /dev/urandom", "is not a detached signature"),
    "half": ("echo '[GNUPG:] NEWSIG'; echo '[GNUPG:] GOODSIG 1 x'", "gpgv cannot verify"),
    "silent": ("exit 0", "is not a detached signature"),
    "no valid": (
        "echo '[GNUPG:] NEWSIG'; echo '[GNUPG:] VALIDSIG A 2024-01-01 1 0 4 0 22 8 00 A'",
        "gpgv cannot verify",
    ),
    "strange end": ("echo '[GNUPG:] NEWSIG'; exit 99", "exit code 99"),
    "floods": ("exec yes '[GNUPG:] NEWSIG'", "Image.0"),
}


@pytest.mark.parametrize("name", FAKES)
async def test_a_gpgv_that_goes_wrong_is_a_refusal(
    site: Site, gpg: Gpg, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    script, said = FAKES[name]
    programs = site.root / "bin"
    programs.mkdir()
    (programs / "gpgv").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "gpgv").chmod(0o755)
    monkeypatch.setattr(openpgp, "PATH", f"{programs}:/usr/bin:/bin")
    if name == "hangs":
        monkeypatch.setattr(openpgp, "VERIFY_SECONDS", 0.1)
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"))
    assert said in found.refusal
    assert found.signers == []


async def test_without_gpgv_the_package_is_named(site: Site, gpg: Gpg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openpgp, "PATH", str(site.root))
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"))
    assert found.refusal == "gpgv is not installed, which verifies it"
    assert "apt-get install gpgv" in found.remedy


def test_gpgv_runs_in_a_unit_of_its_own_after_no_other() -> None:
    command = Command("1a2b", ["gpgv"], {"KHO_VERB": "signature"}, openpgp.SETTINGS, openpgp.UNIT_PREFIX)
    assert unit_name(command.name, prefix=command.unit_prefix) == "kho-gpgv-1a2b.service"


# minisign and signify


@pytest.mark.parametrize("options", [(), ("-l",)], ids=["prehashed", "legacy"])
async def test_what_minisign_signs_is_good(site: Site, options: tuple[str, ...]) -> None:
    key = make_minisign_key(site.keys, "vendor")
    found = await site.verify(sign_minisign(key, site.image, site.root / "s", *options, "-t", "timestamp:1704844800"))
    (signer,) = found.signers
    assert (signer.method, signer.name, signer.signed_at) == ("minisign", "vendor.pub", SIGNED_AT)
    assert signer.key == key.read_text().splitlines()[1]


async def test_what_signify_signs_is_good(site: Site) -> None:
    key = make_signify_key(site.keys, "vendor")
    (signer,) = (await site.verify(sign_signify(key, site.image, site.root / "s"))).signers
    assert (signer.method, signer.name, signer.signed_at) == ("signify", "vendor.pub", None)
    assert signer.key == key.read_text().splitlines()[1]


async def test_a_bad_minisign_signature_says_what_is_wrong(site: Site) -> None:
    key = make_minisign_key(site.keys, "vendor")
    text = sign_minisign(key, site.image, site.root / "s").read_text()
    comment, signature, trusted, last = text.splitlines()
    wrong = {
        "\n".join([comment, signature, f"{trusted}x", last]): "The trusted comment in Image.0 was changed",
        "\n".join([comment, signature]): "not a complete signature",  # prehashed, and no trusted comment
        "\n".join([comment, signature[:-8], trusted, last]): "not a complete signature",
        "\n".join([comment, signature, trusted]): "not a complete signature",
        "\n".join([comment, signature, last, trusted]): "not a complete signature",
        comment: "not a complete signature",
    }
    for changed, said in wrong.items():
        assert said in (await site.verify(changed.encode())).refusal
    found = await site.verify(text.encode(), content=b"another kernel")
    assert "Image.0 is not the signature of Image" in found.refusal
    assert "vendor.pub" in found.refusal
    key.unlink()
    found = await site.verify(text.encode())
    assert f"made by a key that is not in {site.keys}" in found.refusal


async def test_a_key_with_the_number_of_another_is_not_that_key(site: Site) -> None:
    one, two = make_signify_key(site.keys, "one"), make_signify_key(site.root, "two")
    signature = sign_signify(two, site.image, site.root / "s")
    from base64 import b64decode, b64encode  # noqa: PLC0415 - for this test alone

    first, second = (b64decode(key.read_text().splitlines()[1]) for key in (one, two))
    forged = b64encode(second[:10] + first[10:]).decode()
    one.write_text(f"untrusted comment: forged\n{forged}\n")
    assert "is not the signature of Image" in (await site.verify(signature)).refusal


# Keys


@pytest.mark.parametrize("name", ["x.asc", "x.gpg", "x.pub"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense\n", b"\xc3\x01\x00", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n?\n"]
)
async def test_a_file_without_a_key_is_named(site: Site, gpg: Gpg, name: str, content: bytes) -> None:
    signature = gpg.sign("good", site.image, site.root / "s")
    (site.keys / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_keys(site.root)
    assert caught.value.where == str(site.keys / name)
    found = await site.verify(signature)
    assert f"({site.keys / name})" in found.refusal
    assert (await site.verify(signature, policy=Images())).doubts == [found.refusal]


async def test_the_copies_of_a_key_count_together(site: Site, gpg: Gpg) -> None:
    """The revocation in any copy counts, and so does the time that its owner has given it since."""
    fresh = gpg.make_key("renewed", "1m")
    signature = gpg.sign(fresh, site.image, site.root / "s")
    for path in site.keys.iterdir():
        path.unlink()
    old, new = site.keys / "20-old.gpg", site.keys / "30-new.asc"
    gpg.export(old, "renewed")
    assert "has expired" in (await site.verify(signature)).refusal
    gpg.run("--quick-set-expire", fresh, "0")
    gpg.export(new, "renewed", armor=True)
    for name in ("10-new.asc", "30-new.asc"):
        new = new.rename(site.keys / name)
        assert [signer.key for signer in (await site.verify(signature)).signers] == [fresh]
    gpg.revoke("renewed")
    gpg.export(new, "renewed", armor=True)
    for name in ("10-new.asc", "30-new.asc"):
        new = new.rename(site.keys / name)
        assert "was revoked" in (await site.verify(signature)).refusal


async def test_a_subkey_is_revoked_in_any_copy(site: Site, gpg: Gpg) -> None:
    main = gpg.make_key("main")
    gpg.run("--passphrase", "", "--quick-add-key", main, "ed25519", "sign", "never", at=KEY_MADE)
    listed = gpg.run("--with-colons", "--list-keys", main).splitlines()
    subkey = [line.split(":")[9] for line in listed if line.startswith("fpr")][1]
    signature = gpg.sign(f"{subkey}!", site.image, site.root / "s")
    gpg.export(site.keys / "10-old.gpg", "main")
    assert [signer.key for signer in (await site.verify(signature)).signers] == [main]
    gpg.run("--command-fd", "0", "--edit-key", main, text="key 1\nrevkey\ny\n0\n\ny\nsave\n")
    gpg.export(site.keys / "20-new.gpg", "main")
    assert "was revoked" in (await site.verify(signature)).refusal


def test_a_damaged_key_does_not_hide_the_next_one(site: Site, gpg: Gpg) -> None:
    """It is named: its last packet would otherwise have taken the beginning of the next file with it."""
    whole = (site.keys / "vendor.gpg").read_bytes()
    damaged = site.keys / "damaged.gpg"
    long = [bytes([0x80 | PUBLIC_KEY << 2 | 2]) + b"\xff" * 4, bytes([0xC0 | PUBLIC_KEY]) + b"\xff" * 5]
    unknown = [bytes([0x80 | PUBLIC_KEY << 2 | 3]) + whole, bytes([0xC0 | PUBLIC_KEY, 0xE0]) + whole]
    for content in (whole[:60], whole[:-1], whole[:1], whole + b"\n", whole + b"\xc2", *long, *unknown):
        damaged.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_keys(site.root)
        assert caught.value.where == str(damaged)
    gpg.run("--passphrase", "", "--output", damaged, "--export-secret-keys", "good")
    with pytest.raises(ConfigError, match="it has a private key"):
        load_keys(site.root)


def test_a_packet_may_have_a_header_of_either_form(site: Site) -> None:
    """gpg writes the old one, Sequoia the new one."""
    before = load_keys(site.root).openpgp
    path = site.keys / "vendor.gpg"
    packets = [(tag, body) for tag, _packet, body in split_packets(path.read_bytes())]

    def write_length(size: int) -> bytes:
        return bytes([size]) if size < 192 else bytes([192 + (size - 192 >> 8), size - 192 & 0xFF])

    for write in (write_length, lambda size: b"\xff" + size.to_bytes(4)):
        (site.keys / "other.gpg").write_bytes(
            b"".join(bytes([0xC0 | tag]) + write(len(body)) + body for tag, body in packets)
        )
        assert {body for _, _, body in split_packets(load_keys(site.root).openpgp)} == {body for _, body in packets}
        path.unlink(missing_ok=True)
        alone = load_keys(site.root).openpgp
        assert [part[::2] for part in split_packets(alone)] == [part[::2] for part in split_packets(before)]


def test_a_second_key_in_a_file_of_minisign_is_not_left_out(site: Site) -> None:
    one, two = (make_signify_key(site.root, name) for name in ("one", "two"))
    both = site.keys / "both.pub"
    both.write_text(one.read_text() + two.read_text())
    with pytest.raises(ConfigError, match="There is more than one key in this file") as caught:
        load_keys(site.root)
    assert caught.value.where == str(both)


@pytest.mark.parametrize("name", ["", "vendor.gpg", "vendor.pub"])
async def test_a_key_that_every_user_may_write_is_not_trusted(site: Site, gpg: Gpg, name: str) -> None:
    make_signify_key(site.keys, "vendor")
    path = site.keys / name
    path.chmod(path.stat().st_mode | 0o002)
    found = await site.verify(gpg.sign("good", site.image, site.root / "s"))
    assert f"Every user may write here ({path})" in found.refusal
    assert f"chmod o-w {path}" in found.remedy


def test_other_files_are_left_alone(site: Site) -> None:
    (site.keys / "README").write_text("Keys that we trust.\n")
    (site.keys / ".vendor.gpg.swp").write_text("?")
    assert load_keys(site.root)


def test_no_directory_is_no_keys(tmp_path: Path) -> None:
    assert not load_keys(tmp_path)


# Policy


POLICIES = [
    # require, pinned, signed, accepted
    ("none", False, False, True),
    ("none", True, False, True),
    ("digest", False, True, False),
    ("digest", True, False, True),
    ("signature", False, True, True),
    ("signature", True, False, False),
    ("either", False, False, False),
    ("either", True, False, True),
    ("either", False, True, True),
    ("both", True, False, False),
    ("both", False, True, False),
    ("both", True, True, True),
]


@pytest.mark.parametrize(("require", "pinned", "signed", "accepted"), POLICIES)
async def test_policy_says_what_a_file_must_have(
    site: Site, require: str, *, pinned: bool, signed: bool, accepted: bool
) -> None:
    signatures = [sign_signify(make_signify_key(site.keys, "k"), site.image, site.root / "s")] if signed else []
    policy = Images(require=require, sha256=(DIGEST,) if pinned else ())
    found = await site.verify(*signatures, policy=policy)
    assert (found.refusal == "") is accepted
    assert bool(found.remedy) is not accepted
    assert found.pinned_by == (["images.sha256"] if pinned else [])


async def test_pins_alone_require_a_digest(site: Site) -> None:
    found = await site.verify(policy=Images(sha256=("0" * 64,)))
    assert (
        found.refusal == f"The SHA-256 of Image is {DIGEST}, which is not pinned in images.sha256 of /etc/kho/khod.toml"
    )


def test_an_initrd_is_held_to_the_same_unless_policy_says_otherwise() -> None:
    assert find_requirement(Images(require="signature"), "initrd") == "signature"
    assert find_requirement(Images(require="signature", require_initrd="digest"), "initrd") == "digest"
    assert find_requirement(Images(require="signature", require_initrd="none"), "initrd") == "none"
    assert find_requirement(Images(require_initrd="none", sha256=(DIGEST,)), "initrd") == "none"
    assert find_requirement(Images(require_initrd="none", sha256=(DIGEST,)), "kernel") == "digest"


async def test_a_caller_s_digests_add_to_policy_and_replace_nothing(site: Site) -> None:
    found = await site.verify(policy=Images(), pins=["0" * 64])
    assert "is not the file that was asked for" in found.refusal
    assert DIGEST in found.refusal
    found = await site.verify(policy=Images(require="digest"), pins=[DIGEST])
    assert "is not pinned in images.sha256" in found.refusal
    assert (await site.verify(policy=Images(), pins=[DIGEST])).pinned_by == ["the caller"]


async def test_a_bad_signature_that_nobody_requires_is_a_doubt(site: Site, gpg: Gpg) -> None:
    signature = gpg.sign("expired", site.image, site.root / "s")
    found = await site.verify(signature, policy=Images())
    assert found.refusal == ""
    assert "has expired" in found.doubts[0]
    assert "has expired" in (await site.verify(signature, policy=Images(), must_be_signed=True)).refusal


async def test_a_host_without_keys_looks_at_no_signature(site: Site) -> None:
    (site.keys / "vendor.gpg").unlink()
    found = await site.verify(b"whatever", policy=Images())
    assert (found.unverified, found.doubts, found.refusal) == (["Image.0"], [], "")
    found = await site.verify(b"whatever", policy=Images(require="either", sha256=(DIGEST,)))
    assert (found.unverified, found.doubts, found.refusal) == (["Image.0"], [], "")


# The handover


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.hook("db")
    (tmp_path / KEYS).mkdir(parents=True)
    return made


def _require(host: Host, **images: object) -> None:
    host.config = replace(host.config, images=replace(host.config.images, **images))  # type: ignore[arg-type]


def _sign(host: Host, *names: str) -> dict[str, Path]:
    key = make_signify_key(host.directory / KEYS, "vendor")
    return {name: sign_signify(key, host.directory / name, host.directory / f"{name}.sig") for name in names}


def _with_signatures(request: Request, signatures: dict[str, Path]) -> Request:
    def signed(given: Given) -> Given:
        path = signatures.get(given.name)
        return replace(given, signatures=(Given(os.open(path, os.O_RDONLY), path.name),)) if path else given

    assert request.kernel is not None
    return replace(request, kernel=signed(request.kernel), initrds=tuple(map(signed, request.initrds)))


async def test_a_file_without_what_policy_requires_is_refused_before_anyone_is_told(host: Host) -> None:
    _require(host, require="signature")
    engine = await host.started()
    with pytest.raises(CheckFailed, match="vmlinuz has no signature") as caught:
        await host.kexec(engine)
    assert caught.value.check == "provenance"
    assert (host.verbs, host.kernel.calls, engine.machine.phase) == ([], [], Phase.idle)
    attempt = await host.remembered()
    (check,) = [check for check in attempt.checks if check.name == "provenance"]
    assert (attempt.summary.refused, check.result) == (True, CheckResult.fail)


async def test_what_is_refused_is_not_unpacked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    _require(host, require="signature")

    def unpack(*_arguments: object) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr("khod.target.target.unpack_image", unpack)
    monkeypatch.setattr("khod.images.initrd.inspect_initrd", unpack)
    engine = await host.started()
    with host.request() as request:
        checks = {check.name: check for check in await engine.queries.check(request)}
    assert checks["provenance"].result is CheckResult.fail
    assert {checks[name].result for name in ("image", "initrd", "cmdline", "fit")} == {CheckResult.skipped}


@pytest.mark.parametrize("unsigned", ["vmlinuz", "initrd"])
async def test_the_initrd_is_held_to_policy_too(host: Host, unsigned: str) -> None:
    _require(host, require="signature")
    signatures = _sign(host, *({"vmlinuz", "initrd"} - {unsigned}))
    engine = await host.started()
    with host.request(load_only=True) as request, pytest.raises(CheckFailed, match=f"{unsigned} has no signature"):
        await engine.kexec(_with_signatures(request, signatures))


async def test_what_was_verified_by_whom_is_remembered(host: Host) -> None:
    _require(host, require="signature")
    signatures = _sign(host, "vmlinuz", "initrd")
    engine = await host.started()
    with host.request(load_only=True) as request:
        await engine.kexec(_with_signatures(request, signatures))
    await engine.abort()
    attempt = await host.remembered()
    assert attempt.target is not None
    assert [(one.role, one.digest) for one in attempt.target.origins] == [
        (role, hashlib.sha256((host.directory / name).read_bytes()).hexdigest())
        for role, name in [("kernel", "vmlinuz"), ("initrd", "initrd")]
    ]
    assert {signer.name for one in attempt.target.origins for signer in one.signers} == {"vendor.pub"}
    said = [event.message for event in host.events if event.message.startswith("verified: ")]
    assert [line.split(":")[1].strip() for line in said] == ["vmlinuz", "initrd"]


async def test_a_unified_image_is_verified_as_the_one_file_that_was_given(host: Host) -> None:
    unified = portable([(".linux", bzimage()), (".initrd", CPIO), (".cmdline", b"root=/dev/sim")])
    (host.directory / "vmlinuz").write_bytes(unified)
    _require(host, require="signature")
    signatures = _sign(host, "vmlinuz")
    engine = await host.started()
    with host.request(initrd=None, load_only=True) as request:
        await engine.kexec(_with_signatures(request, signatures))
    await engine.abort()
    attempt = await host.remembered()
    assert attempt.target is not None
    (origin,) = attempt.target.origins
    assert origin.digest == hashlib.sha256(unified).hexdigest()
    assert [image.digest for image in attempt.target.images] == [
        hashlib.sha256(contents).hexdigest() for contents in (bzimage(), CPIO)
    ]
    assert f"as it was given: SHA-256 {origin.digest}" in " ".join(render_attempt(attempt).split())


async def test_several_initrds_are_verified_each(host: Host) -> None:
    (host.directory / "second").write_bytes(CPIO)
    _require(host, require="signature", require_initrd="digest", sha256=(hashlib.sha256(CPIO + b"x").hexdigest(),))
    signatures = _sign(host, "vmlinuz")
    engine = await host.started()
    with host.request() as request, (host.directory / "second").open("rb") as second:
        both = replace(request, initrds=(*request.initrds, Given(second.fileno(), "second")))
        checks = {check.name: check for check in await engine.queries.check(_with_signatures(both, signatures))}
    assert checks["provenance"].result is CheckResult.fail
    assert checks["provenance"].evidence.count("is not pinned") == 2
    assert "vmlinuz" not in checks["provenance"].evidence


async def test_a_signature_that_cannot_be_read_is_named(host: Host) -> None:
    _require(host, require="signature")
    empty, large = host.directory / "empty.sig", host.directory / "large.sig"
    empty.write_bytes(b"")
    large.write_bytes(bytes(MAX_SIGNATURE_BYTES + 1))
    engine = await host.started()
    for path in (empty, large):
        with host.request(initrd=None) as request:
            checks = await engine.queries.check(_with_signatures(request, {"vmlinuz": path}))
        (check,) = [check for check in checks if check.name == "provenance"]
        assert check.result is CheckResult.fail
        assert path.name in check.evidence


def _count_images() -> int:
    """How many files khod holds in memory; a descriptor may be gone by the time it is looked at."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith("/memfd:khod-image") for link in links)


async def test_an_error_on_the_way_leaves_no_file_open(host: Host) -> None:
    async def fail(*_arguments: object) -> list[FileOrigin]:
        raise Refused("no")

    host.verify = fail
    signatures = _sign(host, "vmlinuz", "initrd")
    engine = await host.started()
    with host.request() as request:
        signed = _with_signatures(request, signatures)
        before = _count_images()
        with pytest.raises(Refused, match="no"):
            await engine.kexec(signed)
        assert _count_images() == before


@pytest.mark.parametrize("judgement", ["warn", "off"])
async def test_a_check_that_is_softened_lets_it_go_on_and_that_is_remembered(host: Host, judgement: str) -> None:
    _require(host, require="signature")
    host.config = replace(host.config, checks=replace(host.config.checks, provenance=judgement))
    engine = await host.started()
    await host.kexec(engine, load_only=True)
    await engine.abort()
    attempt = await host.remembered()
    checks = {check.name: check for check in attempt.checks}
    assert checks["provenance"].result.name == judgement
    assert "has no signature" in checks["provenance"].evidence
    assert checks["image"].result is CheckResult.passed
    assert attempt.target is not None
    assert all("has no signature" in one.refusal for one in attempt.target.origins)
    for file in ("vmlinuz", "initrd"):
        assert f"checks.provenance says: {file} has no signature" in "\n".join(event.message for event in host.events)
        assert f"{file}: neither pinned nor signed, against the policy of this host" in render_attempt(attempt)


async def test_the_bytes_that_were_verified_are_loaded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files change as soon as khod has read them: in place, as the image of a host that is updated meanwhile."""
    _require(host, require="signature")
    signatures = _sign(host, "vmlinuz", "initrd")
    before = {name: (host.directory / name).read_bytes() for name in signatures}
    loaded: list[bytes] = []

    async def change_and_verify(*arguments: object) -> list[FileOrigin]:
        for name in before:
            (host.directory / name).write_bytes(b"changed")
        return await verify_files(host.directory, Children(), *arguments)  # type: ignore[arg-type]

    def load(kernel_fd: int, initrd_fd: int, _cmdline: bytes, _flags: int) -> None:
        loaded.extend(os.pread(fd, 1 << 20, 0) for fd in (kernel_fd, initrd_fd))

    monkeypatch.setattr(host.kernel, "kexec_file_load", load)
    host.verify = change_and_verify
    engine = await host.started()
    with host.request(load_only=True) as request:
        await engine.kexec(_with_signatures(request, signatures))
    assert loaded == [before["vmlinuz"], before["initrd"]]
