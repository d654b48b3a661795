# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the next kernel reads what this one writes: strings as strings(1) shows them in each lab kernel."""

import mmap
import re
from dataclasses import replace

import pytest

from khod.images.kernel import KernelImageInfo, Signature
from khod.kernel.formats import OutgoingFormats
from khod.target.compatibility import Effect, FormatMatch, check_compatibility

CONFIG = "CONFIG_KEXEC=y\nCONFIG_KEXEC_HANDOVER=y\n"
BUILT_IN = {"memblock-v1", "reserve-mem-v1"}
KNOWN = {
    "6.18.15": BUILT_IN | {"kho-v1", "kho-test-v1"},
    "6.19.11": BUILT_IN | {"kho-v1", "kho-test-v1", "luo-v1", "luo-session-v2", "memfd-v1"},
    "7.2.12": BUILT_IN | {"kho-v4", "luo-v5", "memfd-v2"},
    "7.2.12-luo6": BUILT_IN | {"kho-v4", "luo-v6", "memfd-v2"},
    "7.3.4": BUILT_IN | {"kho-v4", "kho-test-v1", "luo-v5", "memfd-v2"},
}
"""strings -n 5 of the uncompressed kernels."""

LUO = {
    "6.19.11": {"luo-v1", "luo-session-v2"},
    "7.2.12": {"luo-v5"},
    "7.2.12-luo6": {"luo-v6"},
    "7.3.4": {"luo-v5"},
}
"""What LUO's blob says of itself, in an FDT on 6.19.11 and first in a packed struct since."""

ROOT = {name: "kho-v1" if name.startswith("6.") else "kho-v4" for name in KNOWN}
MEMBLOCK = {"memblock": frozenset(BUILT_IN)}
KHO_TEST = {"kho_test": frozenset({"kho-test-v1"})}
ON, NO_LUO, OFF = "kho=on liveupdate=on", "kho=on", "kho=off liveupdate=on"


def kernel(
    compatible: set[str], config: str | None = CONFIG, marks: frozenset[str] = frozenset(), opaque: str = ""
) -> KernelImageInfo:
    """A kernel image that knows these formats."""
    known = frozenset(compatible)
    return KernelImageInfo(
        "bzImage",
        "x86_64",
        "next",
        2047,
        1 << 20,
        1024,
        1 << 24,
        1 << 21,
        0,
        Signature.none,
        config,
        known,
        marks,
        opaque,
    )


def named(why: str) -> set[str]:
    """The formats that an explanation names."""
    return set(re.findall(r"[a-z-]+-v[0-9]+", why))


def writes(name: str, *, luo: bool) -> OutgoingFormats:
    """What a lab kernel writes with kho=on, and with liveupdate=on where it has LUO; its own image is known."""
    luo = luo and name in LUO
    blobs = MEMBLOCK | (KHO_TEST if "kho-test-v1" in KNOWN[name] else {})
    blobs |= {"LUO": frozenset(LUO[name])} if luo else {}
    return OutgoingFormats(ROOT[name], blobs, luo=luo, own=frozenset(KNOWN[name]))


# By kernel/liveupdate/luo_core.c: luo_early_startup() looks at its blob with KHO on, whatever `liveupdate=` says, and
# luo_restore_fail() is panic(). A kernel without CONFIG_LIVEUPDATE looks at none.
PANICS = {
    ("7.2.12", "7.2.12-luo6"),
    ("7.3.4", "7.2.12-luo6"),
    ("7.2.12-luo6", "7.2.12"),
    ("7.2.12-luo6", "7.3.4"),
}
HAS_NO_LUO = {("6.19.11", "6.18.15")}


def expected(running: str, target: str, *, luo: bool, line: str) -> Effect | None:
    """What kho-abi.md says of a pair."""
    if "kho=off" in line or ROOT[running] != ROOT[target]:
        return Effect.nothing
    if not luo or running not in LUO:
        return None
    if (running, target) in PANICS:
        return Effect.panic
    return Effect.files if (running, target) in HAS_NO_LUO or "liveupdate=on" not in line else None


@pytest.mark.parametrize("line", [ON, NO_LUO, OFF])
@pytest.mark.parametrize("luo", [True, False])
@pytest.mark.parametrize("running", KNOWN)
@pytest.mark.parametrize("target", KNOWN)
def test_each_ordered_pair_of_the_lab(running: str, target: str, luo: bool, line: str) -> None:
    found = check_compatibility(writes(running, luo=luo), kernel(KNOWN[target]), line)
    effect = expected(running, target, luo=luo, line=line)
    assert found.effect is effect, found.why
    assert found.answer is (FormatMatch.same if effect is None else FormatMatch.different)
    assert not found.not_inspected
    if effect is Effect.nothing and line != OFF:
        assert {"kho-v1", "kho-v4"} <= named(found.why)
    if effect is Effect.panic:
        assert {"luo-v5", "luo-v6"} <= named(found.why)
    assert found.luo_off is (effect is Effect.files and (running, target) not in HAS_NO_LUO)


@pytest.mark.parametrize(("line", "effect"), [(ON, Effect.files), (NO_LUO, Effect.files), (OFF, Effect.nothing)])
def test_another_file_handler_costs_the_files(line: str, effect: Effect) -> None:
    """Seen from 7.3.4 to a 7.2.12 of another memfd version: it boots, and each open of /dev/liveupdate is EIO."""
    other = kernel(KNOWN["7.2.12"] - {"memfd-v2"} | {"memfd-v3"})
    found = check_compatibility(writes("7.3.4", luo=True), other, line)
    assert found.effect is effect
    if effect is Effect.files:
        assert {"memfd-v2", "memfd-v3"} <= named(found.why)
        assert not found.luo_off, "liveupdate=on does not mend it"
    assert check_compatibility(writes("7.3.4", luo=False), other, NO_LUO).answer is FormatMatch.same, (
        "no file can be handed over"
    )


def test_a_kernel_without_that_file_handler_costs_the_files() -> None:
    """CONFIG_LIVEUPDATE_MEMFD is an option of its own."""
    found = check_compatibility(writes("7.3.4", luo=True), kernel(KNOWN["7.2.12"] - {"memfd-v2"}), ON)
    assert (found.effect, "memfd-v2" in found.why) == (Effect.files, True)


def test_the_worst_of_several_counts() -> None:
    other = kernel({"kho-v4", "luo-v6", "memfd-v3", "memblock-v2", "reserve-mem-v1"})
    found = check_compatibility(writes("7.3.4", luo=True), other, ON)
    assert found.effect is Effect.panic
    assert found.why.index("luo-v6") < found.why.index("memfd-v3") < found.why.index("memblock-v2")


@pytest.mark.parametrize("compatible", [{"memblock-v2", "reserve-mem-v1"}, {"memblock-v1"}, set[str]()])
def test_reserved_memory_in_another_format_begins_empty(compatible: set[str]) -> None:
    """reserve_mem_kho_revive(): the region is reserved anew."""
    found = check_compatibility(OutgoingFormats("kho-v4", MEMBLOCK), kernel({"kho-v4"} | compatible), ON)
    assert (found.answer, found.effect) == (FormatMatch.different, Effect.empty)


def test_a_tree_of_v3_s_that_a_module_carries_is_not_the_root() -> None:
    found = check_compatibility(OutgoingFormats("kho-v4", {"v3": frozenset({"kho-v1"})}), kernel(KNOWN["7.3.4"]), ON)
    assert found.effect is Effect.empty


def test_what_only_tests_is_only_shown() -> None:
    found = check_compatibility(OutgoingFormats("kho-v4", KHO_TEST), kernel({"kho-v4", "kho-test-v2"}), ON)
    assert (found.answer, found.effect) == (FormatMatch.same, None)
    assert "kho-test-v2" in found.why


@pytest.mark.parametrize("opaque", ["", "compressed in a way khod does not know"])
def test_another_page_size_is_another_format(opaque: str) -> None:
    """KHO's radix tree is laid out by PAGE_SHIFT, and the kernels compare `compatible` alone."""
    for size, answer in (
        (mmap.PAGESIZE, FormatMatch.same),
        (0, FormatMatch.same),
        (mmap.PAGESIZE * 16, FormatMatch.different),
    ):
        about = replace(kernel(KNOWN["7.3.4"], opaque=opaque), page_size=size)
        found = check_compatibility(writes("7.3.4", luo=False), about)
        assert found.answer is (FormatMatch.unknown if opaque and answer is FormatMatch.same else answer)
        assert ("KiB" in found.why) is (answer is FormatMatch.different)
        assert found.effect is (Effect.panic if answer is FormatMatch.different else None)


@pytest.mark.parametrize(("arch", "blind"), [("aarch64", True), ("x86_64", False)])
def test_a_page_size_that_nothing_shows_was_not_inspected(arch: str, blind: bool) -> None:
    found = check_compatibility(writes("7.3.4", luo=False), replace(kernel(KNOWN["7.3.4"]), arch=arch))
    assert any("page size" in one for one in found.not_inspected) is blind


def test_luo_that_the_next_kernel_does_not_have_is_lost() -> None:
    written = OutgoingFormats("kho-v1", {**MEMBLOCK, "LUO": frozenset({"luo-v1"})})
    found = check_compatibility(written, kernel(KNOWN["6.18.15"]))
    assert (found.answer, found.effect) == (FormatMatch.different, Effect.files)
    assert "luo-v1" in found.why
    assert check_compatibility(written, kernel(KNOWN["6.19.11"])).answer is FormatMatch.same


def test_another_version_of_luo_s_sessions_panics_too() -> None:
    """luo_session_setup_incoming() is called by luo_early_startup() (6.19)."""
    written = OutgoingFormats("kho-v1", {"LUO": frozenset({"luo-v1", "luo-session-v1"})}, luo=True, own=frozenset())
    assert check_compatibility(written, kernel(KNOWN["6.19.11"]), ON).effect is Effect.panic


def test_luo_of_which_no_format_is_known_cannot_be_told() -> None:
    found = check_compatibility(
        OutgoingFormats("kho-v4", luo=True, not_inspected="no image"), kernel(KNOWN["7.3.4"]), ON
    )
    assert (found.answer, "no image" in found.why) == (FormatMatch.unknown, True)


def test_file_handlers_of_a_kernel_whose_image_is_not_there_were_not_inspected() -> None:
    blobs = {"LUO": frozenset({"luo-v5"})}
    found = check_compatibility(
        OutgoingFormats("kho-v4", blobs, luo=True, not_inspected="no image"), kernel(KNOWN["7.2.12"]), ON
    )
    assert found.answer is FormatMatch.same
    assert any("no image" in one for one in found.not_inspected)


def test_what_a_module_may_read_is_said_and_no_reason_to_refuse() -> None:
    found = check_compatibility(OutgoingFormats("kho-v4", {"pool": frozenset({"my-pool-v1"})}), kernel(KNOWN["7.3.4"]))
    assert found.answer is FormatMatch.same
    assert found.unread == ("my-pool-v1",)


def test_v3_and_mainline_call_their_roots_alike_and_mean_other_layouts() -> None:
    v3, mainline = kernel({"kho-v1"}, marks=frozenset({"dt_max"})), kernel(KNOWN["6.18.15"])
    assert check_compatibility(OutgoingFormats("kho-v1", v3=True), v3, "no kho= is needed").answer is FormatMatch.same
    assert check_compatibility(OutgoingFormats("kho-v1", v3=True), mainline).effect is Effect.nothing
    assert check_compatibility(OutgoingFormats("kho-v1"), v3).effect is Effect.nothing


@pytest.mark.parametrize(
    ("compatible", "config"),
    [(set[str](), None), ({"memblock-v1"}, None), ({"kho-v1"}, "CONFIG_KEXEC=y\n# CONFIG_KEXEC_HANDOVER is not set\n")],
)
def test_a_kernel_without_kho_is_different(compatible: set[str], config: str | None) -> None:
    found = check_compatibility(OutgoingFormats("kho-v1"), kernel(compatible, config))
    assert (found.answer, found.effect) == (FormatMatch.different, Effect.nothing)
    assert "CONFIG_KEXEC_HANDOVER" in found.why


DEFAULT = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"


@pytest.mark.parametrize(
    ("config", "line", "effect"),
    [
        (f"{CONFIG}{DEFAULT}=y\n", "", None),
        (f"{CONFIG}# {DEFAULT} is not set\n", "", Effect.nothing),
        (CONFIG, "", Effect.nothing),  # Linux 6.18 has no such option
        (f"{CONFIG}{DEFAULT}=y\n", "kho=0", Effect.nothing),
        (f"{CONFIG}# {DEFAULT} is not set\n", "kho=on", None),
        (None, "", None),  # nothing says that it is off
    ],
)
def test_kho_may_be_on_by_default(config: str | None, line: str, effect: Effect | None) -> None:
    """kho_enable = IS_ENABLED(CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT), kernel/liveupdate/kexec_handover.c."""
    found = check_compatibility(writes("7.3.4", luo=False), kernel(KNOWN["7.2.12"], config), line)
    assert found.effect is effect


def test_a_kernel_that_may_have_kho_on_by_default_may_panic() -> None:
    other = kernel(KNOWN["7.2.12-luo6"], None)
    assert check_compatibility(writes("7.3.4", luo=True), other, "").effect is Effect.panic


def test_what_cannot_be_looked_at_is_unknown() -> None:
    found = check_compatibility(OutgoingFormats("kho-v1"), kernel(set(), opaque="compressed by lzo"))
    assert found.answer is FormatMatch.unknown
    assert "lzo" in found.why
    assert check_compatibility(OutgoingFormats(""), kernel(KNOWN["7.3.4"])).answer is FormatMatch.unknown
