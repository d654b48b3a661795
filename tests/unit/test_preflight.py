# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of this host and of the next kernel, one by one, on a directory that looks like the host."""

import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from khod import preflight
from khod.abi.calls import HostCalls
from khod.config import CHECKS, Checks, Config, Images
from khod.errors import Failed, KhoError, Refused
from khod.handover.record import Record, Store
from khod.kernel import host
from khod.kernel.kconfig import booted_line
from khod.kernel.kexec import Kexec
from khod.kernel.probe import probe_kho
from khod.model import Check, CheckResult, Observed
from khod.preflight.facts import Facts
from khod.quiesce.host import Survey
from khod.quiesce.selection import Selection
from khod.systemd.logind import Inhibitor
from khod.target.target import Given, Request, Target, build_target, seal_request
from tests.unit.images import CPIO, bzimage, code, portable
from tests.unit.khods import REPOSITORY

OUT = "sys/kernel/debug/kho/out"
MIB, GIB = 1 << 20, 1 << 30
HOST = {
    "proc/sys/kernel/osrelease": "7.3.4\n",
    "proc/sys/kernel/random/boot_id": "boot\n",
    "proc/cmdline": "root=/dev/vda kho=on\n",
    f"{OUT}/scratch_phys": f"{64 * MIB:#x}\n",
    f"{OUT}/scratch_len": f"{256 * MIB:#x}\n",
    f"{OUT}/fdt": "kho-v1\0",
}


class Site:
    """A host in a directory: its files, and the checks run on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.calls = HostCalls(self.root)
        self.targets: list[Target] = []
        (directory / "state").mkdir()
        self.lay(HOST)

    def lay(self, files: Mapping[str, str]) -> None:
        """Write files below the root."""
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link below the root, to nowhere mostly, as those of a namespace are."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).symlink_to(target)

    def image(self, contents: bytes, cmdline: str | None = None, initrds: Sequence[bytes] = (CPIO,)) -> Target:
        """An x86 image as the next kernel, with these initrds."""
        given = []
        try:
            for name, data in [("vmlinuz", contents), *((f"initrd{at}", data) for at, data in enumerate(initrds))]:
                (self.directory / name).write_bytes(data)
                given.append(Given(os.open(self.directory / name, os.O_RDONLY), name))
            request = Request(given[0], tuple(given[1:]), cmdline)
            running = self.calls.read_file("/proc/cmdline").decode()
            files = seal_request(request, Images())
            self.targets.append(build_target(files, request, running, "run", Images(), "x86_64"))
        finally:
            for one in given:
                os.close(one.fd)
        return self.targets[-1]

    def facts(self, target: Target | None = None) -> Facts:
        """What the checks look at."""
        kexec = Kexec(self.calls)
        observed = Observed("boot", "7.3.4", None, loaded=False, arrived=False, cmdline=kexec.cmdline())
        store, record = Store(self.directory / "state"), Record()
        found = probe_kho(self.calls)
        return Facts(found, kexec, observed, store, Config(), record, False, list, None, target)

    def checks(self, target: Target | None = None) -> dict[str, Check]:
        """What the checks find, by name."""
        return {check.name: check for check in preflight.run_checks(self.facts(target))}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for target in made.targets:
        target.close()


def changed(at: int, new: bytes) -> bytes:
    return bzimage()[:at] + new + bzimage()[at + len(new) :]


# The next kernel's header


def test_a_kernel_is_not_placed_below_the_pref_address_of_its_header(site: Site) -> None:
    """bzImage64_load(): buf_min; CONFIG_PHYSICAL_START=0x40000000, and scratch ends at 0x14000000."""
    found = site.checks(site.image(changed(0x258, struct.pack("<Q", GIB))))["fit"]
    assert found.result is CheckResult.fail
    assert "0x40000000" in found.evidence
    assert site.checks(site.image(changed(0x258, struct.pack("<Q", 128 * MIB))))["fit"].result is CheckResult.passed


@pytest.mark.parametrize(
    ("pref", "relocatable", "result"),
    [
        (128 * MIB, 1, CheckResult.passed),
        (128 * MIB, 0, CheckResult.fail),
        (302 * MIB, 0, CheckResult.passed),  # where the loader puts it anyway
        (0, 0, CheckResult.passed),  # it names no place
    ],
)
def test_a_kernel_that_moves_itself_over_what_is_handed_over_is_refused(
    site: Site, pref: int, relocatable: int, result: CheckResult
) -> None:
    image = bytearray(changed(0x258, struct.pack("<Q", pref)))
    image[0x234] = relocatable
    found = site.checks(site.image(bytes(image)))["fit"]
    assert found.result is result, found.evidence
    assert ("relocatable" in found.evidence) is (result is CheckResult.fail)


def test_more_than_the_header_wants_in_memory_is_no_kernel(site: Site) -> None:
    """sanity_check_segment_list(): bufsz > memsz is EINVAL."""
    found = site.checks(site.image(changed(0x260, struct.pack("<I", 4096))))["fit"]
    assert found.result is CheckResult.fail
    assert "init_size" in found.evidence


@pytest.mark.parametrize(
    ("flags", "levels", "result"),
    [("fpu la57 smep", 0, CheckResult.fail), ("fpu la57", 32, CheckResult.passed), ("fpu", 0, CheckResult.passed)],
)
def test_five_levels_of_page_tables_are_held_against_the_image(
    site: Site, flags: str, levels: int, result: CheckResult
) -> None:
    """bzImage64_probe(): without XLF_5LEVEL it says ENOEXEC where pgtable_l5_enabled()."""
    site.lay({"proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\n"})
    found = site.checks(site.image(changed(0x236, struct.pack("<H", 3 | levels))))["image"]
    assert found.result is result


@pytest.mark.parametrize("name", ["scratch", "bootmem"])
def test_more_scratch_is_asked_for_by_the_running_kernel_s_name(site: Site, name: str) -> None:
    for what in ("phys", "len"):
        (site.root / f"{OUT}/scratch_{what}").rename(site.root / f"{OUT}/{name}_{what}")
    assert site.checks(site.image(bzimage()))["fit"].result is CheckResult.passed
    site.lay({f"{OUT}/{name}_len": "0x4000\n"})
    found = site.checks(site.targets[0])["fit"]
    assert (found.result, f"kho_{name}=" in found.remedy) == (CheckResult.fail, True)


def test_a_word_that_the_kernel_would_read_as_two_is_warned_of(site: Site) -> None:
    found = site.checks(site.image(bzimage(), "root=LABEL=voilà kho=on"))["cmdline"]
    assert (found.result, "voilà" in found.evidence) == (CheckResult.warn, True)
    assert "double quotes" in found.remedy
    assert site.checks(site.image(bzimage(), 'root="LABEL=voilà" kho=on'))["cmdline"].result is CheckResult.passed
    site.lay({"proc/cmdline": "root=LABEL=voilà kho=on\n"})
    assert site.checks(site.image(bzimage()))["cmdline"].result is CheckResult.passed, "the running kernel reads it so"


# What would make reboot(2), or the load before it, fail


@pytest.mark.parametrize(
    ("links", "result", "word"),
    [
        ({"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}, CheckResult.passed, "host's"),
        ({"pid": 4026532281, "user": 0xEFFFFFFD}, CheckResult.fail, "EINVAL"),
        ({"pid": 0xEFFFFFFC, "user": 4026532281}, CheckResult.fail, "EPERM"),
        ({"pid": 4026532281}, CheckResult.fail, "PID namespace"),
    ],
)
def test_a_namespace_of_its_own_is_no_place_to_jump_from(
    site: Site, links: Mapping[str, int], result: CheckResult, word: str
) -> None:
    """reboot_pid_ns() in kernel/pid_namespace.c; within a container /proc/1/ns/pid is no other than one's own."""
    for kind, inode in links.items():
        site.link(f"proc/self/ns/{kind}", f"{kind}:[{inode}]")
        site.link(f"proc/1/ns/{kind}", f"{kind}:[{inode}]")
    found = site.checks()["namespaces"]
    assert (found.result, word in found.evidence) == (result, True)


def test_this_host_s_own_namespaces_are_read() -> None:
    found = host.own_namespaces(HostCalls())
    assert found["pid"] is (os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC)
    assert found["user"] is (os.stat("/proc/self/ns/user").st_ino == 0xEFFFFFFD)


CPU = "sys/devices/system/cpu"


@pytest.mark.parametrize(
    ("files", "result", "word"),
    [
        ({f"{CPU}/possible": "0-3\n"}, CheckResult.fail, "CONFIG_HOTPLUG_CPU"),
        ({f"{CPU}/possible": "0\n"}, CheckResult.passed, "1 processors"),
        ({f"{CPU}/possible": "0,2-3\n", f"{CPU}/hotplug/states": ""}, CheckResult.passed, "3 processors"),
        (
            {
                f"{CPU}/possible": "0-1\n",
                f"{CPU}/hotplug/states": "",
                "proc/device-tree/cpus/cpu@1/enable-method": "spin-table\0",
                "proc/device-tree/cpus/cpu@0/enable-method": "psci\0",
            },
            CheckResult.fail,
            "cpu@1",
        ),
        (
            {
                f"{CPU}/possible": "0-1\n",
                f"{CPU}/hotplug/states": "",
                "proc/cmdline": "kvm-arm.mode=protected kho=on\n",
            },
            CheckResult.fail,
            "protected",
        ),
    ],
)
def test_processors_that_cannot_be_let_go_of_are_told_before_anyone_is_frozen(
    site: Site, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], result: CheckResult, word: str
) -> None:
    """arm64's machine_kexec_prepare() says EBUSY where cpus_are_stuck_in_kernel()."""
    site.lay(files)
    assert "processors" not in site.checks()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = site.checks()["processors"]
    assert (found.result, word in found.evidence) == (result, True), found
    assert "EBUSY" in found.evidence or result is CheckResult.passed


def test_the_tdx_erratum_is_warned_of(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    site.lay({"proc/cpuinfo": "processor\t: 0\nbugs\t\t: spectre_v1 tdx_pw_mce\n"})
    assert site.checks()["processors"].result is CheckResult.warn
    site.lay({"proc/cpuinfo": "processor\t: 0\nbugs\t\t: spectre_v1\n"})
    assert "processors" not in site.checks()


def test_every_check_can_be_set() -> None:
    assert set(CHECKS) == preflight.CHECKS.keys() | preflight.IMAGE_CHECKS.keys()
    text = (REPOSITORY / "etc/kho/khod.toml").read_text()
    assert [name for name in CHECKS if f'\n{name} = "default"\n' not in text] == []


# Text of others


def test_who_blocks_a_shutdown_writes_no_line_of_ours(site: Site) -> None:
    """Any user of an active session may take an inhibitor, and names himself and his reason."""
    why = "x\x1b[2J\x1b]0;owned\x07)\npass  signature  vmlinuz is signed"
    held = [Inhibitor("mallory\u202e", why), *(Inhibitor(f"user{number}", "y" * 10_000) for number in range(5000))]
    found = next(
        check for check in preflight.run_checks(replace(site.facts(), inhibitors=held)) if check.name == "inhibitors"
    )
    assert found.result is CheckResult.warn
    assert found.evidence.isprintable()
    assert "mallory?" in found.evidence
    assert "more" in found.evidence
    assert len(found.evidence) < 4000


def test_no_check_of_a_host_that_lies_is_more_than_a_line(site: Site) -> None:
    bad = "\x1b[2J\npass  signature  signed"
    site.lay({"sys/class/watchdog/watchdog0/identity": bad, "sys/class/watchdog/watchdog0/state": "active"})
    site.lay({"proc/cmdline": f"root=/dev/vda kho=on {bad}"})
    image = bzimage(version=b"6.8\x1b[2J\xe2\x80\xae")
    checks = [*site.checks().values(), *site.checks(site.image(image, "root=/dev/vda \x1b[8m\u202e kho=on")).values()]
    assert [check for check in checks if not f"{check.evidence}{check.remedy}".isprintable()] == []
    assert any("\\x1b" in check.evidence for check in checks)


# The signature


def test_of_a_unified_image_it_is_the_kernel_inside_that_must_be_signed(site: Site) -> None:
    """kexec_file_load(2) is given that kernel: the UKI's own signature is the firmware's to check."""
    site.lay({"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"})
    sections = [(".cmdline", b"root=/dev/vda"), (".linux", bzimage())]
    found = site.checks(site.image(portable(sections, certificates=bytes(16))))["signature"]
    assert found.result is CheckResult.fail
    assert found.evidence.startswith("The kernel in vmlinuz has no embedded signature")
    assert "own signature" in found.remedy
    bare = site.checks(site.image(bzimage()))["signature"]
    assert bare.evidence.startswith("vmlinuz has no embedded signature")
    assert "own signature" not in bare.remedy


# Formats, by what a mismatch does

LUO7 = struct.pack("<8sQQQ", b"luo-v5", 1, 0x1000_0000, 0)
KHO = "CONFIG_KEXEC_HANDOVER=y\n"


def next_kernel(*formats: str, config: str | None = KHO) -> bytes:
    return bzimage(contents=code(formats=formats, marks=(), config=config))


def running_7_3(site: Site) -> None:
    """It writes kho-v4 and luo-v5, and has LUO on; its own image, with memfd-v2, is there."""
    site.lay({"proc/cmdline": "root=/dev/vda kho=on liveupdate=on\n", f"{OUT}/fdt": "kho-v4\0"})
    site.lay(
        {f"{OUT}/sub_fdts/LUO": LUO7.decode("latin-1"), "proc/version": "Linux version 7.3.4 (b@h) (gcc) #1 SMP\n"}
    )
    contents = code(formats=("kho-v4", "luo-v5", "memfd-v2"), marks=(), config=None)
    own = contents.replace(b"6.8.0-next (b@h) #1 SMP", b"7.3.4 (b@h) (gcc) #1 SMP")
    (site.root / "boot").mkdir()
    (site.root / "boot/vmlinuz-7.3.4").write_bytes(bzimage(contents=own))


@pytest.mark.parametrize(
    ("formats", "result", "word"),
    [
        (("kho-v4", "luo-v5", "memfd-v2"), CheckResult.passed, "luo-v5"),
        (("kho-v4", "luo-v6", "memfd-v2"), CheckResult.fail, "would panic at boot"),
        (("kho-v4", "luo-v5", "memfd-v3"), CheckResult.fail, "would lose every file"),
        (("kho-v4",), CheckResult.fail, "would lose every file"),
        (("kho-v1", "luo-v5", "memfd-v2"), CheckResult.fail, "would not take over any state"),
    ],
)
def test_the_evidence_names_what_would_happen(
    site: Site, formats: Sequence[str], result: CheckResult, word: str
) -> None:
    running_7_3(site)
    found = site.checks(site.image(next_kernel(*formats)))["formats"]
    assert (found.result, word in found.evidence) == (result, True), found


def test_liveupdate_that_is_not_on_the_next_line_is_warned_of_and_saves_from_no_panic(site: Site) -> None:
    running_7_3(site)
    line = "root=/dev/vda kho=on"
    found = site.checks(site.image(next_kernel("kho-v4", "luo-v5", "memfd-v2"), line))["formats"]
    assert (found.result, "liveupdate=on" in found.remedy) == (CheckResult.warn, True)
    found = site.checks(site.image(next_kernel("kho-v4", "luo-v6", "memfd-v2"), line))["formats"]
    assert (found.result, "would panic" in found.evidence) == (CheckResult.fail, True)


def test_reserved_memory_that_would_begin_empty_is_a_warning(site: Site) -> None:
    site.lay({f"{OUT}/fdt": "kho-v4\0", f"{OUT}/sub_fdts/memblock": "memblock-v1\0"})
    found = site.checks(site.image(next_kernel("kho-v4", "memblock-v2")))["formats"]
    assert (found.result, "begin with a part of the state empty" in found.evidence) == (CheckResult.warn, True)


def test_file_handlers_that_nothing_shows_are_reported_as_not_inspected(site: Site) -> None:
    """A check that passes is a promise."""
    running_7_3(site)
    (site.root / "boot/vmlinuz-7.3.4").unlink()
    found = site.checks(site.image(next_kernel("kho-v4", "luo-v5", "memfd-v2")))["formats"]
    assert (found.result, "not inspected" in found.evidence) == (CheckResult.warn, True)
    assert "/boot/vmlinuz-7.3.4" in found.remedy


PANIC = ("kho-v4", "luo-v6", "memfd-v2")
NOTHING = ("kho-v1",)


@pytest.mark.parametrize(
    ("judgement", "formats", "result"),
    [
        ("default", PANIC, CheckResult.fail),
        ("warn", PANIC, CheckResult.fail),  # an operator who softens the check has not asked for this
        ("off", PANIC, CheckResult.off),
        ("warn", NOTHING, CheckResult.warn),
        ("off", NOTHING, CheckResult.off),
        ("off", ("kho-v4", "luo-v5", "memfd-v2"), CheckResult.skipped),
    ],
)
def test_what_the_operator_makes_of_it(site: Site, judgement: str, formats: Sequence[str], result: CheckResult) -> None:
    running_7_3(site)
    config = Config(checks=Checks(formats=judgement))
    facts = replace(site.facts(site.image(next_kernel(*formats))), config=config)
    checks = preflight.run_checks(facts)
    found = next(check for check in checks if check.name == "formats")
    assert (found.result, "checks.formats" in found.evidence) == (result, judgement == "off")
    if judgement == "off":
        assert any(one in found.evidence for one in formats), "it has looked"
    refused = result is CheckResult.fail
    with pytest.raises(Refused) if refused else nullcontext():
        preflight.require_passed([found])
    assert len(preflight.overridden_findings(checks)) == (result is CheckResult.off)


# Kexec HandOver by default

DEFAULT = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"


@pytest.mark.parametrize(
    ("config", "line", "result"),
    [
        (f"{KHO}{DEFAULT}=y\n", "root=/dev/vda ro", CheckResult.passed),
        (f"{KHO}# {DEFAULT} is not set\n", "root=/dev/vda ro", CheckResult.fail),
        (f"{KHO}{DEFAULT}=y\n", "root=/dev/vda ro kho=off", CheckResult.fail),
        (f"{KHO}# {DEFAULT} is not set\n", "root=/dev/vda ro kho=on", CheckResult.passed),
        (None, "root=/dev/vda ro", CheckResult.warn),
    ],
)
def test_kho_that_is_on_by_default_here_is_looked_for_there(
    site: Site, config: str | None, line: str, result: CheckResult
) -> None:
    site.lay({"proc/cmdline": "root=/dev/vda ro\n", f"{OUT}/fdt": "kho-v4\0"})
    found = site.checks(site.image(next_kernel("kho-v4", config=config), line))["cmdline"]
    assert found.result is result, found
    assert ("kho=on" in found.remedy) is (result is not CheckResult.passed)
    if config is None:
        assert "not inspected" in found.evidence


def test_kho_on_that_the_next_kernel_does_not_need_is_no_loss(site: Site) -> None:
    target = site.image(next_kernel("kho-v4", config=f"{KHO}{DEFAULT}=y\n"), "root=/dev/vda")
    assert site.checks(target)["cmdline"].result is CheckResult.passed


@pytest.mark.parametrize(
    ("line", "config", "word"),
    [
        ("ro", f"{KHO}{DEFAULT}=y\n", "debugfs is not mounted"),
        ("ro kho=off", f"{KHO}{DEFAULT}=y\n", "switched off"),
        ("ro", KHO, "switched off"),
        ("ro kho=on", KHO, "debugfs is not mounted"),
    ],
)
def test_kho_by_default_without_debugfs_is_told_what_it_lacks(
    tmp_path: Path, line: str, config: str, word: str
) -> None:
    site = Site(tmp_path)
    shutil.rmtree(site.root / "sys")
    site.lay({"proc/cmdline": f"{line}\n", "boot/config-7.3.4": config, "proc/mounts": "proc /proc proc rw 0 0\n"})
    assert word in probe_kho(site.calls).what


# A command line that the next kernel was built with


@pytest.mark.parametrize(
    ("config", "booted"),
    [
        ('CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="a=\\"b c\\" kho=on"\n', 'a="b c" kho=on given'),
        ('CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE=""\n', "given"),
        ('CONFIG_CMDLINE="own"\nCONFIG_CMDLINE_EXTEND=y\n', "given own"),
        ('CONFIG_CMDLINE="own"\nCONFIG_CMDLINE_FROM_BOOTLOADER=y\n', "given"),
        ('CONFIG_CMDLINE="own"\n# CONFIG_CMDLINE_FORCE is not set\n', "given"),
        ('CONFIG_CMDLINE="own"\nCONFIG_CMDLINE_FORCE=y\n', "own"),
        ('CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="own"\nCONFIG_CMDLINE_OVERRIDE=y\n', "own"),
        ("CONFIG_CMDLINE_OVERRIDE=y\n", ""),
        ("# CONFIG_CMDLINE_BOOL is not set\n", "given"),
    ],
)
def test_a_built_in_command_line_counts_as_the_kernel_puts_it(config: str, booted: str) -> None:
    assert booted_line(config, "given") == booted


@pytest.mark.parametrize(
    ("own", "result"), [("root=/dev/vda", CheckResult.fail), ("root=/dev/vda kho=on", CheckResult.warn)]
)
def test_a_kernel_that_reads_no_command_line_but_its_own_is_told(site: Site, own: str, result: CheckResult) -> None:
    config = f'{KHO}# {DEFAULT} is not set\nCONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="{own}"\nCONFIG_CMDLINE_OVERRIDE=y\n'
    site.lay({"proc/cmdline": "ro kho=on\n", f"{OUT}/fdt": "kho-v4\0"})
    found = site.checks(site.image(next_kernel("kho-v4", config=config), "root=UUID=1 kho=on"))
    assert (found["cmdline"].result, own in found["cmdline"].evidence) == (result, True)
    assert (found["formats"].result is CheckResult.fail) is (result is CheckResult.fail)
    assert found["initrd"].result is CheckResult.passed, "root=/dev/vda is mounted, and root=UUID=1 never read"


def test_what_a_built_in_command_line_switches_on_is_no_loss(site: Site) -> None:
    config = f'{KHO}# {DEFAULT} is not set\nCONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="root=/dev/vda kho=on"\n'
    site.lay({"proc/cmdline": "ro kho=on\n", f"{OUT}/fdt": "kho-v4\0"})
    found = site.checks(site.image(next_kernel("kho-v4", config=config), "quiet"))
    assert found["cmdline"].result is found["initrd"].result is CheckResult.passed
    off = site.checks(site.image(next_kernel("kho-v4", config=config), "quiet kho=off"))
    assert off["cmdline"].result is CheckResult.fail


def test_a_check_that_fails_itself_ends_no_other(site: "Site", monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_facts: object) -> None:
        raise ValueError("junk")

    monkeypatch.setattr(preflight, "CHECKS", {**preflight.CHECKS, "kexec": broken})
    found = site.checks()
    assert (found["kexec"].result, "junk" in found["kexec"].evidence) == (CheckResult.fail, True)
    assert "producers" in found


# A quiesce, after which khod jumps itself


def quiesce_checks(site: Site, survey: Survey | KhoError) -> dict[str, Check]:
    site.lay({"run/systemd/system/x": "", "proc/uptime": "3.00 2.00\n"})
    facts = replace(site.facts(), survey=survey, inhibitors=[Inhibitor("backup", "it runs")])
    return {check.name: check for check in preflight.run_checks(facts)}


def test_an_inhibitor_refuses_a_jump_of_khod_and_no_uptime_is_asked_for(site: Site) -> None:
    found = quiesce_checks(site, Survey(Selection(("a.service",), (("b.service", "it is khod's"),))))
    assert found["quiesce"].result is CheckResult.passed
    assert found["quiesce"].evidence == "1 unit can be stopped and started again, 1 stay"
    assert found["inhibitors"].result is CheckResult.fail
    assert "backup" in found["inhibitors"].evidence
    assert found["uptime"].result is CheckResult.passed


def test_files_in_the_store_of_another_unit_leave_the_jump_to_systemd(site: Site) -> None:
    found = quiesce_checks(site, Survey(stores=("other.service",)))
    assert found["quiesce"].result is CheckResult.warn
    assert "other.service" in found["quiesce"].evidence
    assert found["inhibitors"].result is CheckResult.warn


def test_a_systemd_that_does_not_answer_is_in_the_way_of_a_quiesce(site: Site) -> None:
    found = quiesce_checks(site, Failed("systemd does not describe its units", remedy="Look."))
    assert (found["quiesce"].result, found["quiesce"].remedy) == (CheckResult.fail, "Look.")
