# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each generation on a directory that looks like its kernel, and the probe that tells them apart."""

import errno
import gzip
from collections.abc import Mapping
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.kernel.debugfs import Finalize, FinalizeNoAbort, Stateless
from khod.kernel.kexec import Kexec
from khod.kernel.probe import probe_kho
from khod.kernel.protocol import AbortKind, KhoKernel, pair_regions
from khod.kernel.sysfs import SysfsKho
from khod.model import Generation, Order
from khod.region import Region
from khod.simulated.kernel import build_tree

V3, DEBUG = "sys/kernel/kho", "sys/kernel/debug/kho"
HOST = {
    "proc/sys/kernel/osrelease": "6.18.15\n",
    "proc/cmdline": "root=/dev/vda kho=on\n",
    "proc/mounts": "proc /proc proc rw 0 0\ndebugfs /sys/kernel/debug debugfs rw 0 0\n",
}
SCRATCH = {"scratch_phys": "0x100000000\n", "scratch_len": "0x20000000\n"}
V3_FILES = {f"{V3}/{name}": text for name, text in {"active": "0\n", "dt_max": "0xa00000\n", **SCRATCH}.items()}
OUT = {f"{DEBUG}/out/{name}": text for name, text in SCRATCH.items()}
BOOTMEM = {name.replace("scratch", "bootmem"): text for name, text in OUT.items()}  # from Linux 7.4 on
FDT = {f"{DEBUG}/out/fdt": "tree", f"{DEBUG}/out/sub_fdts/memblock": "m", f"{DEBUG}/out/sub_fdts/LUO": "l"}
KEXEC_DIRECTORY = {"sys/kernel/kexec/loaded": "0\n"}  # came with 6.19

KERNELS: dict[str, tuple[Mapping[str, str], type[KhoKernel] | None]] = {
    "v3": (V3_FILES, SysfsKho),
    "v3, active": ({**V3_FILES, f"{V3}/active": "1\n", f"{V3}/dt": "tree"}, SysfsKho),
    "v3 on a kernel with mainline KHO too": ({**V3_FILES, **OUT, **FDT}, SysfsKho),
    "6.18": ({**OUT, f"{DEBUG}/out/finalize": "0\n"}, Finalize),
    "6.18, finalized": ({**OUT, **FDT, f"{DEBUG}/out/finalize": "1\n"}, Finalize),
    "6.19": ({**OUT, **FDT, **KEXEC_DIRECTORY, f"{DEBUG}/out/finalize": "0\n"}, FinalizeNoAbort),
    "6.19, finalized": ({**OUT, **FDT, **KEXEC_DIRECTORY, f"{DEBUG}/out/finalize": "1\n"}, FinalizeNoAbort),
    "7.3": ({**OUT, **FDT, **KEXEC_DIRECTORY}, Stateless),
    "7.4": ({**BOOTMEM, **FDT, **KEXEC_DIRECTORY}, Stateless),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lay(tmp_path, HOST)
    return tmp_path


def lay(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("name", KERNELS)
def test_the_probe_tells_the_generations_apart_by_what_they_show(root: Path, name: str) -> None:
    files, generation = KERNELS[name]
    lay(root, files)
    for release in ("6.8.0", "6.18.15", "7.3.4", "9.0.0-vendor"):  # never by the version
        lay(root, {"proc/sys/kernel/osrelease": f"{release}\n"})
        found = probe_kho(HostCalls(root))
        assert type(found.kernel) is generation
        assert found.what
        assert found.remedy == ""


WITHOUT_KHO = [
    ("not compiled in", {}, b"CONFIG_KEXEC=y\n# CONFIG_KEXEC_HANDOVER is not set\n", "CONFIG_KEXEC_HANDOVER=y"),
    (
        "another option of that prefix",
        {},
        b"CONFIG_KEXEC=y\nCONFIG_KEXEC_HANDOVER_DEBUG=y\n",
        "CONFIG_KEXEC_HANDOVER=y",
    ),
    ("no kho=on", {"proc/cmdline": "quiet\n"}, b"#\nCONFIG_KEXEC_HANDOVER=y\n", "kho=on"),
    ("kho=off", {"proc/cmdline": "kho=off\n"}, b"#\nCONFIG_KEXEC_HANDOVER=y\n", "kho=on"),
    ("only kho_scratch=", {"proc/cmdline": "kho_scratch=512M\n"}, b"#\nCONFIG_KEXEC_HANDOVER=y\n", "kho=on"),
    (
        "debugfs unmounted",
        {"proc/mounts": "proc /proc proc rw 0 0\n"},
        b"#\nCONFIG_KEXEC_HANDOVER=y\n",
        "mount -t debugfs",
    ),
    ("no sign of it", {}, b"#\nCONFIG_KEXEC_HANDOVER=y\n", "kernel log"),
]


@pytest.mark.parametrize("name", [name for name, *_rest in WITHOUT_KHO])
@pytest.mark.parametrize("where", ["proc/config.gz", "boot/config-6.18.15"])
def test_a_kernel_without_kho_is_told_with_what_to_add(root: Path, name: str, where: str) -> None:
    _name, files, config, remedy = next(row for row in WITHOUT_KHO if row[0] == name)
    lay(root, files)
    (root / where).parent.mkdir(exist_ok=True)
    (root / where).write_bytes(gzip.compress(config) if where.endswith(".gz") else config)
    found = probe_kho(HostCalls(root))
    assert found.kernel is None
    assert found.what
    assert remedy in found.remedy


@pytest.mark.parametrize("word", ["kho=on", "kho=1", "kho=y", "kho=Y"])
def test_any_way_to_say_on_is_understood(root: Path, word: str) -> None:
    lay(root, {"proc/cmdline": f"quiet {word}\n"})
    (root / "proc/config.gz").write_bytes(gzip.compress(b"#\nCONFIG_KEXEC_HANDOVER=y\n"))
    assert "kho=on to the" not in probe_kho(HostCalls(root)).remedy


def test_without_any_configuration_the_symbols_decide(root: Path) -> None:
    lay(root, {"proc/kallsyms": "0000 T kexec_load\n"})
    assert "CONFIG_KEXEC_HANDOVER=y" in probe_kho(HostCalls(root)).remedy
    lay(root, {"proc/kallsyms": "0000 T kho_preserve_pages\n"})
    assert "CONFIG_KEXEC_HANDOVER=y" not in probe_kho(HostCalls(root)).remedy


def test_a_damaged_configuration_is_no_answer(root: Path) -> None:
    (root / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_KEXEC_HANDOVER=y\n" * 99)[:40])
    assert probe_kho(HostCalls(root)).kernel is None


@pytest.mark.parametrize(
    ("base", "parameter"),
    [
        (V3_FILES, "kho_scratch="),
        ({**OUT, **FDT}, "kho=on"),
        ({**BOOTMEM, **FDT}, "kho=on"),
        (KERNELS["6.18"][0], "kho=on"),
    ],
)
@pytest.mark.parametrize("text", ["0x0\n", "0x0\n0x0\n", ""])
def test_no_scratch_memory_is_unusable_and_names_the_parameter(
    root: Path, base: Mapping[str, str], parameter: str, text: str
) -> None:
    lay(root, {**base, **{name: text for name in base if "scratch" in name or "bootmem" in name}})
    found = probe_kho(HostCalls(root))
    assert found.kernel is None
    assert "scratch" in found.what
    assert parameter in found.remedy


@pytest.mark.parametrize("broken", ["out/scratch_phys", "out/scratch_len", "out/finalize"])
def test_what_cannot_be_read_is_evidence_and_no_exception(root: Path, broken: str) -> None:
    """Lockdown lets the names be seen and not the contents."""
    lay(root, KERNELS["6.19"][0])
    (root / DEBUG / broken).unlink()
    (root / DEBUG / broken).mkdir()
    found = probe_kho(HostCalls(root))
    assert found.kernel is None
    assert found.what
    assert found.remedy


def test_the_probe_of_a_host_with_nothing_at_all(tmp_path: Path) -> None:
    found = probe_kho(HostCalls(tmp_path))
    assert found.kernel is None
    assert found.what
    assert found.remedy


def test_scratch_is_one_region_a_line_and_0x0_is_none() -> None:
    phys, length = b"0x1000\n0x0\n0x100000000\n", b"0x2000\n0x0\n0x40000000\n"
    assert pair_regions(phys, length) == [Region(0x1000, 0x2000), Region(0x100000000, 0x40000000)]
    with pytest.raises(ValueError, match="shorter"):
        pair_regions(b"0x1000\n0x2000\n", b"0x1000\n")


ROWS = [
    (SysfsKho, Generation.sysfs, Order.activate_first, AbortKind.clean),
    (Finalize, Generation.finalize, Order.activate_first, AbortKind.forgets),
    (FinalizeNoAbort, Generation.finalize_no_abort, Order.load_first, AbortKind.needless),
    (Stateless, Generation.stateless, Order.load_first, AbortKind.needless),
]


@pytest.mark.parametrize("row", ROWS)
def test_each_generation_knows_its_order_and_what_an_abort_costs(
    row: tuple[type[KhoKernel], object, object, object],
) -> None:
    made, *facts = row
    assert [made.generation, made.order, made.abort] == facts


def test_v3_activates_with_1_and_aborts_with_0(root: Path) -> None:
    lay(root, V3_FILES)
    kernel, active = SysfsKho(HostCalls(root)), root / V3 / "active"
    assert kernel.is_active() is False
    kernel.activate()
    assert active.read_text() == "1\n"
    assert kernel.is_active() is True
    kernel.deactivate()
    assert active.read_text() == "0\n"


def test_v3_reads_its_trees(root: Path) -> None:
    lay(root, V3_FILES)
    kernel = SysfsKho(HostCalls(root))
    assert kernel.arrived_tree() is None
    with pytest.raises(FileNotFoundError, match=f"/{V3}/dt") as raised:
        kernel.outgoing_tree()
    assert raised.value.errno == errno.ENOENT
    (root / V3 / "dt").write_bytes(build_tree(1))
    (root / "sys/firmware/kho").mkdir(parents=True)
    (root / "sys/firmware/kho/dt").write_bytes(build_tree(2))
    arrived = kernel.arrived_tree()
    assert arrived is not None
    assert (kernel.outgoing_tree().root, arrived.root) == (build_tree(1), build_tree(2))
    assert not kernel.outgoing_tree().blobs
    assert kernel.scratch_regions() == [Region(0x1_0000_0000, 0x2000_0000)]


def test_6_18_finalizes_with_1_and_aborts_with_0(root: Path) -> None:
    lay(root, KERNELS["6.18"][0])
    kernel, finalize = Finalize(HostCalls(root)), root / DEBUG / "out/finalize"
    assert kernel.is_active() is False
    kernel.activate()
    assert finalize.read_text() == "1\n"
    assert kernel.is_active() is True
    kernel.deactivate()
    assert finalize.read_text() == "0\n"


def test_6_19_finalizes_and_has_nothing_to_leave(root: Path) -> None:
    lay(root, KERNELS["6.19"][0])
    kernel, finalize = FinalizeNoAbort(HostCalls(root)), root / DEBUG / "out/finalize"
    assert kernel.is_active() is None
    kernel.activate()
    assert finalize.read_text() == "1\n"
    kernel.deactivate()
    assert finalize.read_text() == "1\n", "a 0 would be EINVAL"


def test_stateless_writes_nothing(root: Path) -> None:
    lay(root, KERNELS["7.3"][0])
    kernel = Stateless(HostCalls(root))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    kernel.activate()
    kernel.deactivate()
    assert kernel.is_active() is None
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("generation", [Finalize, FinalizeNoAbort, Stateless])
def test_mainline_trees_are_a_root_and_a_blob_for_each_producer(root: Path, generation: type[Stateless]) -> None:
    lay(root, {**OUT, **FDT, f"{DEBUG}/in/fdt": "came", f"{DEBUG}/in/sub_fdts/memblock": "mm"})
    kernel = generation(HostCalls(root))
    assert (kernel.outgoing_tree().root, kernel.outgoing_tree().blobs) == (b"tree", {"LUO": b"l", "memblock": b"m"})
    arrived = kernel.arrived_tree()
    assert arrived is not None
    assert (arrived.root, arrived.blobs) == (b"came", {"memblock": b"mm"})


@pytest.mark.parametrize("generation", [Finalize, FinalizeNoAbort, Stateless])
def test_nothing_arrived_where_there_is_no_in(root: Path, generation: type[Stateless]) -> None:
    lay(root, {**OUT, **FDT})
    assert generation(HostCalls(root)).arrived_tree() is None


@pytest.mark.parametrize(("path", "text"), [("sys/kernel/kexec/loaded", "1\n"), ("sys/kernel/kexec_loaded", "1\n")])
def test_loaded_is_read_where_this_kernel_has_it(root: Path, path: str, text: str) -> None:
    assert Kexec(HostCalls(root)).is_loaded() is False
    lay(root, {path: text, "sys/kernel/kexec_crash_loaded": "0\n"})
    assert Kexec(HostCalls(root)).is_loaded() is True


def test_the_crash_slot_is_another_matter(root: Path) -> None:
    lay(root, {"sys/kernel/kexec_loaded": "0\n", "sys/kernel/kexec_crash_loaded": "1\n"})
    assert Kexec(HostCalls(root)).is_loaded() is False


@pytest.mark.parametrize(("text", "left"), [("-1\n", None), ("0\n", 0), ("3\n", 3)])
def test_the_limit_of_loads(root: Path, text: str, left: int | None) -> None:
    assert Kexec(HostCalls(root)).load_limit() is None
    lay(root, {"proc/sys/kernel/kexec_load_limit_reboot": text})
    assert Kexec(HostCalls(root)).load_limit() == left


@pytest.mark.parametrize(
    ("name", "parameter"), [("7.3", "kho_scratch="), ("7.4", "kho_bootmem="), ("v3", "kho_scratch=")]
)
def test_scratch_is_read_and_named_as_the_running_kernel_calls_it(root: Path, name: str, parameter: str) -> None:
    lay(root, KERNELS[name][0])
    kernel = probe_kho(HostCalls(root)).kernel
    assert kernel is not None
    assert kernel.scratch_regions() == [Region(0x1_0000_0000, 0x2000_0000)]
    assert kernel.scratch_parameter == parameter


def test_where_both_names_are_shown_the_newer_one_counts(root: Path) -> None:
    lay(root, {**OUT, f"{DEBUG}/out/bootmem_phys": "0x1000\n0x2000\n", f"{DEBUG}/out/bootmem_len": "0x1000\n0x3000\n"})
    assert Stateless(HostCalls(root)).scratch_regions() == [Region(0x1000, 0x1000), Region(0x2000, 0x3000)]


def test_half_of_a_name_is_evidence(root: Path) -> None:
    lay(root, {f"{DEBUG}/out/bootmem_phys": "0x1000\n"})
    found = probe_kho(HostCalls(root))
    assert found.kernel is None
    assert "bootmem_len" in found.what


def test_where_no_name_can_be_told_both_are_suggested(root: Path) -> None:
    lay(root, {"proc/cmdline": "quiet\n"})
    (root / "proc/config.gz").write_bytes(gzip.compress(b"#\nCONFIG_KEXEC_HANDOVER=y\n"))
    remedy = probe_kho(HostCalls(root)).remedy
    assert "kho_scratch=" in remedy
    assert "kho_bootmem=" in remedy
