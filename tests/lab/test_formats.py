# SPDX-License-Identifier: LGPL-2.1-or-later
"""Will the target understand? Every ordered pair of the lab's kernels, and predictions held against the jump."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab.conftest import Find, Online
from tests.lab.errors import GuestLost
from tests.lab.host import KHO, LUO_OFF, Host, image
from tests.lab.kernels import MEMFD, NEXT_LUO, UPGRADE
from tests.lab.store import check_arrived, fill, start_store

NO_LUO = ("--remove", "liveupdate=on")
MEBIBYTES = 8


@dataclass(frozen=True)
class Formats:
    """What a kernel writes and reads, as its sources have it (include/linux/kho/abi); "" where it has no LUO."""

    root: str
    luo: str = ""
    memfd: str = ""


FORMATS = {
    "6.18.15": Formats("kho-v1"),
    "6.19.11": Formats("kho-v1", "luo-v1", "memfd-v1"),
    UPGRADE: Formats("kho-v4", "luo-v5", "memfd-v2"),
    "7.3.4": Formats("kho-v4", "luo-v5", "memfd-v2"),
    NEXT_LUO: Formats("kho-v4", "luo-v6", "memfd-v2"),
    MEMFD: Formats("kho-v4", "luo-v5", "memfd-v3"),
}
PREBUILT = [version for version in FORMATS if version != MEMFD]
"""MEMFD is built where it is asked for, which takes a quarter of an hour: `make proof` does."""


def judged(host: Host, version: str, *words: str) -> dict[str, str]:
    """Give what the check `formats` says to this kernel as the next one; the other checks may say anything."""
    result = host.guest.run(["khoctl", "check", *image(version), *words, "--json"], check=False)
    assert result.rc in (0, 3), result.stderr
    (found,) = [check for check in json.loads(result.stdout) if check["name"] == "formats"]
    assert (result.rc == 3) >= (found["result"] == "fail")
    return dict(found)


def foretold(running: str, following: str, *, on: bool, next_on: bool, held: bool) -> tuple[str, str]:
    """Give the result and the words of the answer: `on` and `next_on` is liveupdate=on, `held` that files are held.

    An unequal root hands over nothing; an unequal LUO panics whatever the next command line has (seen); with LUO off in
    the next kernel nobody looks at its files.
    """
    ours, its = FORMATS[running], FORMATS[following]
    if ours.root != its.root:
        return "fail", f"would not take over any state: this kernel writes {ours.root}, it reads {its.root}"
    if not on or not ours.luo:
        return "passed", "reads what this kernel writes"
    if not its.luo:
        return "fail", f"would lose every file that is handed over: LUO is written in {ours.luo}"
    if ours.luo != its.luo:
        return "fail", f"would panic at boot: LUO is written in {ours.luo}, it reads {its.luo}"
    if ours.memfd != its.memfd:
        return "fail", f"would lose every file that is handed over: files are handed over as {ours.memfd}"
    if not next_on:
        return "fail" if held else "warn", "would lose every file that is handed over: LUO is off in it"
    return "passed", "reads what this kernel writes"


def told_apart(host: Host, running: str, versions: list[str], *, on: bool, held: bool = False) -> None:
    """Hold the answer for each of these kernels as the next one, with LUO switched on in it and off."""
    for following in versions:
        for next_on, words in ((on, ()), (not on, NO_LUO if on else ("--append", "liveupdate=on"))):
            found = judged(host, following, *words)
            result, evidence = foretold(running, following, on=on, next_on=next_on, held=held)
            assert found["result"] == result, (following, next_on, found)
            assert evidence in found["evidence"], (following, next_on, found)


def keep_own_image(host: Host, version: str) -> None:
    """Put the running kernel's image where distributions have it: it alone shows in which format files are."""
    host.shell(f"mkdir -p /boot; cp /lab/kernels/{version}/bzImage /boot/vmlinuz-$(uname -r)")


def pairs() -> Iterator[object]:
    """Each kernel with LUO on and off; but one of them in `make proof`."""
    for version in PREBUILT:
        for on in (True, False):
            marks = () if (version, on) == ("7.3.4", True) else (pytest.mark.proof,)
            yield pytest.param(version, on, marks=marks, id=f"{version}, liveupdate {'on' if on else 'off'}")


@pytest.mark.parametrize(("version", "on"), [*pairs()])
def test_each_kernel_as_the_next_one(online: Online, version: str, on: bool) -> None:
    host = Host(online(version, kho=KHO if on else LUO_OFF))
    keep_own_image(host, version)
    told_apart(host, version, PREBUILT, on=on)


@pytest.mark.proof
@pytest.mark.parametrize("version", [version for version in PREBUILT if FORMATS[version].luo])
def test_each_kernel_as_the_next_one_while_files_are_held(online: Online, version: str) -> None:
    host = Host(online(version))
    keep_own_image(host, version)
    start_store(host)
    fill(host, MEBIBYTES)
    host.khoctl("activate")
    told_apart(host, version, PREBUILT, on=True, held=True)


@pytest.mark.proof
def test_another_format_of_files_loses_them(online: Online, kernels: Find) -> None:
    host = Host(online("7.3.4"))
    keep_own_image(host, "7.3.4")
    host.shell(f"mkdir -p /lab/kernels/{MEMFD}")
    host.guest.put(f"/lab/kernels/{MEMFD}/bzImage", kernels(MEMFD).bzimage.read_bytes())
    told_apart(host, "7.3.4", [MEMFD], on=True)
    start_store(host)
    fill(host, MEBIBYTES)
    host.configure("formats", '[checks]\nformats = "warn"\n')

    host.kexec(MEMFD)

    status = host.settled(code=7)
    assert status["phase"] == "degraded", status
    assert "kv-store" in status["verdict"]["missing"]


@pytest.mark.parametrize(
    "releases", [(UPGRADE,), pytest.param((UPGRADE, "7.3.4"), marks=pytest.mark.proof)], ids=" ".join
)
def test_a_producer_s_memory_arrives_in_another_release(online: Online, releases: tuple[str, ...]) -> None:
    host, running = Host(online("7.3.4")), "7.3.4"
    start_store(host)
    digest = fill(host, MEBIBYTES)
    for release in releases:
        keep_own_image(host, running)
        assert judged(host, release)["result"] == "passed"
        host.kexec(release)
        check_arrived(host, digest, MEBIBYTES)
        running = release
    assert host.shell("uname -r").startswith(running)


@pytest.mark.proof
def test_a_panic_that_is_foretold_comes(online: Online) -> None:
    """Refused where the check is set to warn, too; where it is off, the next kernel panics in LUO's start."""
    host = Host(online("7.3.4"))
    before = host.guest.boot_id
    for setting, code in (("fail", 3), ("warn", 3)):
        host.configure("formats", f'[checks]\nformats = "{setting}"\n')
        refused = host.khoctl("kexec", *image(NEXT_LUO), code=code)
        assert "would panic at boot" in refused.stderr
        assert host.status()["phase"] == "idle"
    host.configure("formats", '[checks]\nformats = "off"\n')
    host.guest.start(["khoctl", "kexec", *image(NEXT_LUO)])

    with pytest.raises(GuestLost, match="the kernel panicked"):
        host.guest.wait_reboot(before)

    assert "disabling live update" in host.guest.console().partition("Kernel panic")[2].partition("\n")[0]


@pytest.mark.proof
def test_predictions_hold_over_two_jumps(online: Online) -> None:
    """6.18.15 to 6.19.11: both write kho-v1, all arrives. From there to 7.3.4, which reads kho-v4: nothing does."""
    host = Host(online("6.18.15"))
    host.write_line()

    host.kexec("6.19.11", *NO_LUO)

    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    assert {"memblock", "kho_test"} <= set(status["verdict"]["arrived"])
    log = host.dmesg()
    assert "Revived memory reservation 'trace' from KHO" in log
    assert "KHO restore succeeded" in log
    assert host.has_line()

    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    for words in ("check formats", "kho-v1", "kho-v4"):
        assert words in refused.stderr
    assert host.status()["phase"] == "verified"
    assert host.word("/sys/kernel/kexec_loaded") == "0"

    host.configure("formats", '[checks]\nformats = "warn"\n')
    assert judged(host, "7.3.4")["result"] == "warn"
    host.kexec("7.3.4")

    status = host.settled(code=7)
    assert status["phase"] == "degraded"
    assert status["verdict"]["arrived"] == []
    assert "memblock" in status["verdict"]["missing"]
    log = host.dmesg()
    assert "is incompatible with 'kho-v4'" in log
    assert "Revived memory reservation" not in log
    host.khoctl("verify", code=7)
    assert host.guest.wait_online() == "degraded"  # the unit asks the same, and may hear it a little later
    assert host.shell("systemctl show -P ActiveState kho-verify.service").strip() == "failed"
    host.shell("rm /etc/kho/khod.toml.d/formats.toml; systemctl reload kho-handover")


def test_losses_on_the_command_line_are_named(online: Online) -> None:
    host = Host(online("7.3.4"))
    kept = host.checks(*image("7.3.4"))["cmdline"]
    assert kept["result"] == "passed"

    words = ("reserve_mem", "trace_instance", "liveupdate")
    lost = host.checks(*image("7.3.4"), *(part for word in words for part in ("--remove", word)))["cmdline"]
    assert lost["result"] == "warn"
    for word in ("reserve_mem=12M:4096:trace", "trace_instance=boot_map@trace", "liveupdate=on"):
        assert word in lost["evidence"]

    moved = host.checks(*image("7.3.4"), "--remove", "reserve_mem", "--append", "reserve_mem=8M:4096:trace")["cmdline"]
    assert moved["result"] == "warn"
    assert "reserve_mem=12M:4096:trace" in moved["evidence"]

    bare = host.checks(*image("7.3.4"), "--cmdline", "console=ttyS0 root=/dev/vda rw panic=-1", code=3)["cmdline"]
    assert bare["result"] == "fail"
    for word in ("kho=on", "liveupdate=on", "reserve_mem=12M:4096:trace", "trace_instance=boot_map@trace"):
        assert word in bare["evidence"]
