# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the next kernel understands what this one writes, read from its image before it is loaded."""

import enum
import mmap
import re
from collections.abc import Iterator

from khod.dataclass import dataclass
from khod.images.kernel import KernelImageInfo
from khod.kernel.formats import LUO, OutgoingFormats
from khod.kernel.kconfig import KHO_BY_DEFAULT, is_set
from khod.kernel.next_arg import boolean_value, is_switched_on

V3_MARK = "dt_max"
"""A file name that only v3 has: mainline 6.16 also names its root kho-v1, with another layout."""

PAGE_SIZES_DIFFER = ("aarch64", "ppc64le", "loongarch64")
"""Architectures whose kernels are built for one of several page sizes."""


class FormatMatch(enum.Enum):
    """Whether the next kernel reads what this one writes."""

    same = "same"
    different = "different"
    unknown = "unknown"


class Effect(enum.Enum):
    """The effect of a format mismatch on a handover, the worst first; the value describes it."""

    panic = "would panic at boot"
    nothing = "would not take over any state"
    files = "would lose every file that is handed over"
    empty = "would begin with a part of the state empty"
    shown = "would not show all that it was handed"


SEVERITY = list(Effect)

ROOT = Effect.nothing
"""The effect for the root, `kho-vN`: kho_populate() logs `disabling KHO revival` (6.19.11 to 7.3.4, seen)."""

EFFECTS = {
    "luo": Effect.panic,  # luo_early_startup(), luo_restore_fail() (7.3.4 to 7.2.12 with luo-v6, seen)
    "luo-session": Effect.panic,  # luo_session_setup_incoming(), which luo_early_startup() calls (6.19)
    "luo-flb": Effect.panic,  # luo_flb_setup_incoming(), the same way
    "memfd": Effect.files,  # `No registered handler`, and each open of /dev/liveupdate is EIO (seen)
    "memblock": Effect.empty,  # reserve_mem_kho_revive(): the memory is reserved again
    "reserve-mem": Effect.empty,
    "kho-test": Effect.shown,  # lib/test_kho.c, which tests and holds nothing
}
"""The effect of a mismatch in a blob or a file handler, by family."""

OTHERWISE = Effect.empty
"""The effect for a family that is not in EFFECTS and has another version in the image: its reader begins anew."""

PAGE_SIZE = Effect.panic
"""The effect of another page size: the map of preserved pages would be misread.

Its keys depend on PAGE_SHIFT, and the next kernel compares only `compatible`.
"""

NO_LUO = Effect.files
"""The effect for LUO's state in a kernel that has no LUO, or has it switched off: nothing reads it."""


@dataclass(frozen=True)
class Mismatch:
    """One difference between the kernels: its effect, and what differs."""

    effect: Effect
    what: str


@dataclass(frozen=True)
class Compatibility:
    """Whether the next kernel reads the state, and why.

    `effect` is the worst effect, None without one. `unread` names formats that only a module may read, which no image
    shows. `not_inspected` says what could not be examined in either kernel. `luo_off` tells whether the only problem is
    that the next kernel's command line leaves LUO switched off.
    """

    answer: FormatMatch
    why: str
    unread: tuple[str, ...] = ()
    effect: Effect | None = None
    not_inspected: tuple[str, ...] = ()
    luo_off: bool = False


def check_compatibility(written: OutgoingFormats, kernel: KernelImageInfo, line: str | None = None) -> Compatibility:
    """Compare each format of the running kernel with those the image knows.

    `line` is the next kernel's command line; None means one that switches everything on.
    """
    if (lost := _nothing_arrives(written, kernel, line)) is not None:
        return Compatibility(FormatMatch.different, lost, effect=ROOT)
    if kernel.page_size not in (0, mmap.PAGESIZE):
        # kho_radix_encode_key() keys the preserved pages by PAGE_SHIFT (include/linux/kho/abi/kexec_handover.h, 7.3),
        # memfd and LUO count in pages, and kho_populate() compares only `compatible`.
        ours, its = (f"{size >> 10} KiB" for size in (mmap.PAGESIZE, kernel.page_size))
        what = f"its pages have {its}, this kernel's {ours}, and KHO counts in pages: it would take memory for another"
        return Compatibility(FormatMatch.different, what, effect=PAGE_SIZE)
    if kernel.opaque:
        return Compatibility(FormatMatch.unknown, f"its code cannot be looked at: {kernel.opaque}")
    if not written.root:
        reads = ", ".join(_known_formats(kernel, "kho"))
        return Compatibility(
            FormatMatch.unknown, f"the running kernel does not show which format it writes; it reads {reads}"
        )
    if written.luo and not any(format_family(one) == "luo" for one in written.blobs.get(LUO, ())):
        return Compatibility(
            FormatMatch.unknown, f"the running kernel has LUO on and does not show its format: {written.not_inspected}"
        )
    return _judge_blobs(written, kernel, line)


def next_kho(kernel: KernelImageInfo, line: str) -> bool | None:
    """Whether the next kernel starts with KHO on: by `kho=`, else by its build; None if it is not known.

    v3 has no such parameter: it is on if it has scratch memory.
    """
    if V3_MARK in kernel.marks:
        return True
    said = boolean_value(line, "kho")
    if said is None and kernel.config is not None:
        return is_set(kernel.config, KHO_BY_DEFAULT)
    return said


def _nothing_arrives(written: OutgoingFormats, kernel: KernelImageInfo, line: str | None) -> str | None:
    """Return why the next kernel ignores all state; None if it does not, or if that is not known."""
    if line is not None and not written.v3 and next_kho(kernel, line) is False:
        return "Kexec HandOver is off in it: kho=on is not on its command line"
    if kernel.opaque:
        return None
    reads = _known_formats(kernel, "kho")
    if not reads or (kernel.config is not None and not is_set(kernel.config, "CONFIG_KEXEC_HANDOVER")):
        return "it was built without Kexec HandOver (CONFIG_KEXEC_HANDOVER)"
    if written.root and written.root not in kernel.compatible:
        return f"this kernel writes {written.root}, it reads {', '.join(reads)}"
    if written.v3 is not (V3_MARK in kernel.marks) and written.root == "kho-v1":
        ours, its = ("v3's", "mainline's") if written.v3 else ("mainline's", "v3's")
        return f"both formats are named {written.root} but differ: this kernel writes {ours}, the image reads {its}"
    return None


def _judge_blobs(written: OutgoingFormats, kernel: KernelImageInfo, line: str | None) -> Compatibility:
    """Compare the blobs below a root that both kernels know."""
    unread = [
        one
        for formats in written.blobs.values()
        for one in sorted(formats)
        if format_family(one) not in EFFECTS and not _known_formats(kernel, format_family(one))
    ]
    found = [one for name, formats in written.blobs.items() for one in _blob_mismatches(name, formats, kernel)]
    if written.luo:
        found += _file_mismatches(written, kernel)
    found.sort(key=lambda one: SEVERITY.index(one.effect))
    luo_off = False
    if written.luo and line is not None and not is_switched_on(line, "liveupdate"):
        worst = found[0].effect if found else Effect.shown
        if SEVERITY.index(worst) > SEVERITY.index(NO_LUO):
            luo_off = worst is Effect.shown
            found.insert(0, Mismatch(NO_LUO, "LUO is off in it: liveupdate=on is not on its command line"))
    blind = tuple(_not_inspected(written, kernel))
    if found and (effect := found[0].effect) is not Effect.shown:
        why = "; ".join(one.what for one in found)
        return Compatibility(FormatMatch.different, why, tuple(unread), effect, blind, luo_off)
    both = {written.root, *(one for formats in written.blobs.values() for one in formats)} | _file_formats(
        written.own or frozenset()
    )
    why = f"both speak {', '.join(sorted(both & kernel.compatible))}"
    return Compatibility(
        FormatMatch.same, "; ".join([why, *(one.what for one in found)]), tuple(unread), not_inspected=blind
    )


def _blob_mismatches(name: str, formats: frozenset[str], kernel: KernelImageInfo) -> Iterator[Mismatch]:
    for one in sorted(formats - kernel.compatible, key=format_family):  # luo before luo-session
        kind = format_family(one)
        if known := _known_formats(kernel, kind):
            what = f"{name} is written in {one}, it reads {', '.join(known)}"
            yield Mismatch(EFFECTS.get(kind, OTHERWISE), what)
        elif kind in EFFECTS:
            effect = EFFECTS[kind]
            if effect is Effect.panic and not _known_formats(kernel, "luo"):
                effect = NO_LUO
            yield Mismatch(effect, f"{name} is written in {one}, which it does not know")


def _file_mismatches(written: OutgoingFormats, kernel: KernelImageInfo) -> Iterator[Mismatch]:
    """Compare the file handlers; no tree shows them before a file is handed over, but each kernel's image does."""
    if not _known_formats(kernel, "luo"):
        return  # reported with LUO's own blob
    for one in sorted(_file_formats(written.own or frozenset()) - kernel.compatible):
        known = ", ".join(_known_formats(kernel, format_family(one))) or "none of the kind"
        yield Mismatch(
            Effect.files, f"files are handed over as {one}, it reads {known}, and /dev/liveupdate would answer EIO"
        )


def _not_inspected(written: OutgoingFormats, kernel: KernelImageInfo) -> Iterator[str]:
    if written.luo and written.own is None:
        yield f"in which formats this kernel hands files over ({written.not_inspected})"
    if kernel.page_size == 0 and kernel.arch in PAGE_SIZES_DIFFER:
        yield "its page size"


def _file_formats(formats: frozenset[str]) -> frozenset[str]:
    return frozenset(one for one in formats if EFFECTS.get(format_family(one)) is Effect.files)


def _known_formats(kernel: KernelImageInfo, kind: str) -> list[str]:
    return sorted(known for known in kernel.compatible if format_family(known) == kind)


def format_family(compatible: str) -> str:
    """Return the name without its version: `kho` for kho-v4."""
    return re.sub(r"-v[0-9]+$", "", compatible)
