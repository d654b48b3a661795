# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel that loads signed images alone: what is not signed or was changed is explained, what is signed goes over."""

import shutil
import struct
from pathlib import Path

import pytest

from tests.lab.conftest import Find, Online
from tests.lab.host import INITRD, Host, image
from tests.lab.kernels import SIGNED
from tests.lab.process import call

CHANGED, UNSIGNED = "/lab/changed", "/lab/unsigned"
HOOK = 'freeze = ["touch", "/run/frozen"]\nthaw = ["touch", "/run/thawed"]\n'


def corrupted(path: Path) -> bytes:
    """One bit turned over in the image's own code, behind the packed kernel (Documentation/arch/x86/boot.rst)."""
    data = bytearray(path.read_bytes())
    (payload_offset, payload_length) = struct.unpack_from("<II", data, 0x248)
    at = (data[0x1F1] + 1) * 512 + payload_offset + payload_length + 64
    data[at] ^= 1
    return bytes(data)


def unsigned(path: Path, place: Path) -> bytes:
    """The same image with its signature taken off."""
    bare = place / "unsigned"
    shutil.copyfile(path, bare)
    call(["sbattach", "--remove", bare])
    return bare.read_bytes()


def untouched(host: Host) -> None:
    """Hold that nothing is loaded and nobody is left frozen."""
    assert host.status()["phase"] == "idle"
    assert host.word("/sys/kernel/kexec_loaded") == "0"
    assert host.shell("test -e /run/frozen -a ! -e /run/thawed && echo left || true") == ""


@pytest.mark.proof
def test_only_what_is_signed_goes_over(online: Online, kernels: Find, tmp_path: Path) -> None:
    host = Host(online(SIGNED))
    host.guest.put("/etc/kho/producers.d/hook.toml", HOOK)
    host.guest.put(CHANGED, corrupted(kernels(SIGNED).bzimage))
    host.guest.put(UNSIGNED, unsigned(kernels(SIGNED).bzimage, tmp_path))
    bare = "--image", UNSIGNED, "--initrd", INITRD

    found = host.checks(*bare, code=3)["signature"]
    assert found["result"] == "fail"
    assert "not signed" in found["evidence"]
    assert found["remedy"]
    refused = host.khoctl("kexec", *bare, code=3)
    assert "not signed" in refused.stderr
    host.shell("test ! -e /run/frozen")
    untouched(host)

    # That there is a signature can be seen; whether it is good, only the loader finds out.
    changed = "--image", CHANGED, "--initrd", INITRD
    assert host.checks(*changed)["signature"]["result"] == "passed"
    failed = host.khoctl("kexec", *changed, code=1)
    assert "EKEYREJECTED" in failed.stderr
    assert "PEFILE: Digest mismatch" in failed.stderr
    untouched(host)

    host.configure("signature", '[checks]\nsignature = "off"\n')
    failed = host.khoctl("kexec", *bare, code=1)
    assert "ENODATA" in failed.stderr
    assert "sign" in failed.stderr.split("ENODATA", 1)[1]
    # Of the kernel's two lines khod quotes the one that names the cause.
    assert "PEFILE: Unsigned PE binary" in failed.stderr
    assert "Enforced kernel signature verification failed (-61)" in host.dmesg()
    # One without an EFI stub is no PE, and could not even be signed.
    failed = host.khoctl("kexec", *image("7.3.4"), code=1)
    assert "ELIBBAD" in failed.stderr
    untouched(host)

    host.shell("rm /etc/kho/khod.toml.d/signature.toml; systemctl reload kho-handover")
    assert host.checks(*image(SIGNED))["signature"]["result"] == "passed"
    host.kexec(SIGNED)
    host.khoctl("verify")
    assert host.status()["phase"] == "verified"
    assert "KHO restore succeeded" in host.dmesg()
