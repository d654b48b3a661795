# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signed and pinned images from end to end: khoctl, khod as a process, the simulated kernel, the history."""

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.errors import Exit
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import Answer, Khod, call, until
from tests.unit.signing import make_minisign_key, make_signify_key, sign_minisign, sign_signify

REQUIRED = '[images]\nrequire = "signature"\n'


class Site:
    """A khod with images beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys = directory / "root/etc/kho/keys.d"
        self.keys.mkdir(parents=True)
        self.kernel, self.initrd = directory / "vmlinuz", directory / "initrd"
        self.kernel.write_bytes(bzimage())
        self.initrd.write_bytes(CPIO)
        self.configure(REQUIRED)
        self.khod = Khod(directory)

    def configure(self, text: str) -> None:
        (self.directory / "root/etc/kho/khod.toml").write_text(text)

    def reload(self, text: str) -> None:
        self.configure(text)
        self.khod.process.send_signal(signal.SIGHUP)
        self.khod.word("READY=1")

    def khoctl(self, command: str, *words: str | Path) -> Answer:
        return self.khod.khoctl(command, "--image", self.kernel, "--initrd", self.initrd, *words)

    def sign(self, *files: Path, suffix: str = ".minisig") -> None:
        key = make_minisign_key(self.keys, "vendor")
        for file in files:
            sign_minisign(key, file, file.with_name(f"{file.name}{suffix}"))

    @property
    def digests(self) -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in (self.kernel, self.initrd)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.khod.close()


def test_a_signed_kernel_is_taken_and_its_signer_remembered(site: Site) -> None:
    """Refused without signatures, before anything is done; taken with those that lie beside the files."""
    answer = site.khoctl("kexec", "--now", "--no-block")
    assert answer.code == Exit.refused
    for file in (site.kernel, site.initrd):
        assert f"{file} has no signature, which [images] in /etc/kho/khod.toml requires" in " ".join(answer.err.split())
    assert (site.khod.active, site.khod.loaded) == (False, False)
    site.sign(site.kernel, site.initrd)
    checked = site.khoctl("check", "--json")
    (check,) = [one for one in checked.json if one["name"] == "provenance"]
    assert check["result"] == "passed"
    for digest in site.digests:
        assert digest in check["evidence"]
    assert "signed by vendor.pub (minisign RW" in check["evidence"]
    site.khoctl("kexec", "--now", "--no-block")
    site.khod.word("READY=1")  # of the next khod
    until(lambda: len(site.khod.khoctl("history", "--json").json["attempts"]) == 2, site.khod.process)
    shown = " ".join(site.khod.khoctl("history", "show").out.split())
    key = (site.keys / "vendor.pub").read_text().splitlines()[1]
    for role, file in (("kernel", site.kernel), ("initrd", site.initrd)):
        assert f"{role} {file}: signed by vendor.pub (minisign {key})" in shown
    report = site.khod.khoctl("report", "--html", "-").out
    assert report.partition("Files that were given")[2].count(key) == 2


def test_a_signature_that_is_named_must_be_good_whatever_policy_says(site: Site) -> None:
    site.reload("")
    site.sign(site.initrd)
    assert site.khoctl("check").code == Exit.done
    wrong = site.directory / "initrd.minisig"
    answer = site.khoctl("check", "--signature", wrong)
    assert answer.code == Exit.refused
    assert f"{wrong} is not the signature of {site.kernel}" in " ".join(answer.out.split())


def test_a_profile_has_digests_and_signatures_of_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = site.directory / "profiles"
    profiles.mkdir()
    monkeypatch.setenv("KHO_PROFILES", str(profiles))
    key = make_signify_key(site.keys, "vendor")
    for file in (site.kernel, site.initrd):
        sign_signify(key, file, site.directory / f"{file.name}.made")

    def check(*lines: str) -> str:
        signed = [f'signature = "{site.kernel}.made"', f'initrd_signature = "{site.initrd}.made"']
        files = [f'image = "{site.kernel}"', f'initrd = "{site.initrd}"']
        (profiles / "night.toml").write_text("\n".join([*files, *signed, *lines]))
        answer = site.khod.khoctl("check", "--profile", "night", "--json")
        (found,) = [one for one in answer.json if one["name"] == "provenance"]
        return f"{found['result']}: {found['evidence']}"

    assert check().startswith("passed: ")
    assert "pinned by the caller" in check(f"sha256 = {site.digests}")
    assert "is not the file that was asked for" in check(f"sha256 = {site.digests[:1]}")
    answer = site.khod.khoctl("check", "--profile", "night", "--json")
    assert answer.code == Exit.refused


def test_a_pin_of_the_caller_does_not_stand_for_one_of_the_host(site: Site) -> None:
    """Who may call khod may not say what this host trusts."""
    pins = [word for digest in site.digests for word in ("--sha256", digest)]
    assert site.khoctl("check", *pins).code == Exit.refused


@pytest.mark.parametrize("digest", ["", "0" * 63, "g" * 64, "0" * 65])
def test_a_digest_that_is_none_is_a_wrong_call(site: Site, digest: str) -> None:
    answer = site.khoctl("check", "--sha256", digest)
    assert answer.code == Exit.usage
    assert "--sha256" in answer.err


def test_more_signatures_than_initrds_are_a_wrong_call(site: Site) -> None:
    site.sign(site.initrd)
    given = ("--initrd-signature", f"{site.initrd}.minisig")
    answer = site.khoctl("check", *given, *given)
    assert answer.code == Exit.usage
    assert "2 signatures for 1 initrds" in answer.err


@pytest.mark.parametrize("number", [-1, 0, 1 << 40])
def test_a_signature_of_an_initrd_that_is_not_there_is_a_wrong_call(site: Site, number: int) -> None:
    with site.kernel.open("rb") as kernel, site.khod.connect() as client:
        asked = {"image": 0, "signatures": [{"file": 1, "initrd": number}]}
        answer = call(client, "Check", files=[kernel.fileno(), kernel.fileno()], kernel=asked)
    assert answer["error"] == "io.kho.Handover.UsageError"
    assert f"initrd number {number}" in answer["parameters"]["what"]


def test_a_signature_without_an_image_is_a_wrong_call(site: Site) -> None:
    assert site.khod.khoctl("check", "--signature", site.kernel).code == Exit.usage


def test_a_signature_beside_what_a_link_leads_to_is_found(site: Site) -> None:
    site.sign(site.kernel, site.initrd)
    link = site.directory / "links/kernel"
    link.parent.mkdir()
    link.symlink_to(site.kernel)
    site.kernel = link
    assert site.khoctl("plan").code == Exit.done
