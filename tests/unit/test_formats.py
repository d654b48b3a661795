"""Whether the next kernel reads what this one writes: strings as strings(1) shows them in each lab kernel."""

import mmap
from dataclasses import replace

import pytest

from khod.formats import Answer, understood
from khod.images.kernel import Kernel, Signature
from khod.kernel.written import Written

CONFIG = "CONFIG_KEXEC=y\nCONFIG_KEXEC_HANDOVER=y\n"
KNOWN = {
    "6.18.15": {"kho-v1", "kho-test-v1", "memblock-v1", "reserve-mem-v1"},
    "6.19.11": {"kho-v1", "kho-test-v1", "memblock-v1", "reserve-mem-v1", "luo-v1", "luo-session-v2", "memfd-v1"},
    "7.3.4": {"kho-v4", "kho-test-v1", "memblock-v1", "reserve-mem-v1", "luo-v5", "memfd-v2"},
}
MEMBLOCK = {"memblock": frozenset({"memblock-v1", "reserve-mem-v1"}), "kho_test": frozenset({"kho-test-v1"})}
WRITES = {
    "6.18.15": Written("kho-v1", MEMBLOCK),
    "6.19.11": Written("kho-v1", MEMBLOCK),
    "7.3.4": Written("kho-v4", MEMBLOCK),
}


def kernel(
    compatible: set[str], config: str | None = CONFIG, marks: frozenset[str] = frozenset(), opaque: str = ""
) -> Kernel:
    """A kernel image that knows these formats."""
    known = frozenset(compatible)
    return Kernel(
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


SAME = {("6.18.15", "6.19.11"), ("6.19.11", "6.18.15"), *((one, one) for one in KNOWN)}


@pytest.mark.parametrize("running", WRITES)
@pytest.mark.parametrize("target", KNOWN)
def test_each_ordered_pair_of_the_lab(running: str, target: str) -> None:
    found = understood(WRITES[running], kernel(KNOWN[target]))
    assert found.answer is (Answer.same if (running, target) in SAME else Answer.different)
    if found.answer is Answer.different:
        assert {"kho-v1", "kho-v4"} <= set(found.why.replace(",", " ").split())


@pytest.mark.parametrize("opaque", ["", "compressed in a way khod does not know"])
def test_another_page_size_is_another_format(opaque: str) -> None:
    """KHO's radix tree is laid out by PAGE_SHIFT, and the kernels compare `compatible` alone."""
    for size, answer in ((mmap.PAGESIZE, Answer.same), (0, Answer.same), (mmap.PAGESIZE * 16, Answer.different)):
        about = replace(kernel(KNOWN["7.3.4"], opaque=opaque), page_size=size)
        found = understood(WRITES["7.3.4"], about)
        assert found.answer is (Answer.unknown if opaque and answer is Answer.same else answer)
        assert ("KiB" in found.why) is (answer is Answer.different)


def test_luo_that_the_next_kernel_does_not_have_is_lost() -> None:
    writes = Written("kho-v1", {**MEMBLOCK, "LUO": frozenset({"luo-v1"})})
    found = understood(writes, kernel(KNOWN["6.18.15"]))
    assert found.answer is Answer.different
    assert "luo-v1" in found.why
    assert understood(writes, kernel(KNOWN["6.19.11"])).answer is Answer.same


def test_another_version_of_one_producer_s_format_is_different() -> None:
    found = understood(Written("kho-v4", {"LUO": frozenset({"luo-v4"})}), kernel(KNOWN["7.3.4"]))
    assert found.answer is Answer.different
    assert "luo-v4" in found.why
    assert "luo-v5" in found.why


def test_what_a_module_may_read_is_said_and_no_reason_to_refuse() -> None:
    found = understood(Written("kho-v4", {"pool": frozenset({"my-pool-v1"})}), kernel(KNOWN["7.3.4"]))
    assert found.answer is Answer.same
    assert found.unread == ("my-pool-v1",)


def test_v3_and_mainline_call_their_roots_alike_and_mean_other_layouts() -> None:
    v3, mainline = kernel({"kho-v1"}, marks=frozenset({"dt_max"})), kernel(KNOWN["6.18.15"])
    assert understood(Written("kho-v1", v3=True), v3).answer is Answer.same
    assert understood(Written("kho-v1", v3=True), mainline).answer is Answer.different
    assert understood(Written("kho-v1"), v3).answer is Answer.different


@pytest.mark.parametrize(
    ("compatible", "config"),
    [(set[str](), None), ({"memblock-v1"}, None), ({"kho-v1"}, "CONFIG_KEXEC=y\n# CONFIG_KEXEC_HANDOVER is not set\n")],
)
def test_a_kernel_without_kho_is_different(compatible: set[str], config: str | None) -> None:
    found = understood(Written("kho-v1"), kernel(compatible, config))
    assert found.answer is Answer.different
    assert "CONFIG_KEXEC_HANDOVER" in found.why


def test_what_cannot_be_looked_at_is_unknown() -> None:
    found = understood(Written("kho-v1"), kernel(set(), opaque="compressed by lzo"))
    assert found.answer is Answer.unknown
    assert "lzo" in found.why
    assert understood(Written(""), kernel(KNOWN["7.3.4"])).answer is Answer.unknown
