# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signatures of a real kernel, verified by a confined khod: gpgv runs in a unit of its own, minisign's within khod."""

import tempfile
from pathlib import Path

from tests.lab import kernels
from tests.lab.conftest import Online
from tests.lab.host import INITRD, Host, image
from tests.lab.test_apparmor import denied
from tests.unit.signing import Gpg, make_minisign_key, sign_minisign

VERSION = "7.3.4"
KEYS = "/etc/kho/keys.d"
POLICY = '[images]\nrequire = "signature"\nrequire_initrd = "digest"\nsha256 = ["{digest}"]\n'


def test_a_confined_khod_verifies_what_it_loads(online: Online, tmp_path: Path) -> None:
    host = Host(online(VERSION))
    kernel = kernels.find(VERSION).bzimage
    with tempfile.TemporaryDirectory(prefix="gpg-") as home:
        gpg = Gpg(Path(home))
        try:
            key = gpg.make_key("vendor")
            gpg.export(tmp_path / "vendor.gpg", "vendor")
            host.guest.put("/root/openpgp", gpg.sign("vendor", kernel, tmp_path / "openpgp").read_bytes())
        finally:
            gpg.close()
    minisign = make_minisign_key(tmp_path, "mini")
    host.guest.put("/root/minisign", sign_minisign(minisign, kernel, tmp_path / "minisign").read_bytes())
    for path in (tmp_path / "vendor.gpg", minisign):
        host.guest.put(f"{KEYS}/{path.name}", path.read_bytes())
    digest = host.sha256(INITRD)
    host.configure("images", POLICY.format(digest=digest))

    assert "has no signature" in host.khoctl("kexec", *image(VERSION), "--load-only", code=3).stderr
    found = host.checks(*image(VERSION), "--signature", "/root/openpgp", "--signature", "/root/minisign")["provenance"]
    assert found["result"] == "passed"
    assert f"signed by vendor <vendor@example.org> (openpgp {key}) on 2024-01-10, verified by gpgv" in found["evidence"]
    assert "signed by mini.pub (minisign RW" in found["evidence"]
    assert f"SHA-256 {digest}, pinned by images.sha256" in found["evidence"]
    assert host.shell("systemctl list-units --all --plain --no-legend 'kho-gpgv-*'").strip() == ""
    assert denied(host) == []
