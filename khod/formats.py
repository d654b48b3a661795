"""Whether the next kernel understands what this one writes, read off its image before it is loaded."""

import enum
import mmap
import re
from dataclasses import dataclass

from khod.images.kernel import Kernel
from khod.kernel.built import is_set
from khod.kernel.written import Written

BUILT_IN = frozenset({"kho", "memblock", "reserve-mem"})
"""Families no module brings: what the image does not know of these, the kernel does not. `luo` is one by its name."""

V3_MARK = "dt_max"
"""A file of v3's: mainline 6.16 calls its root kho-v1 too, and means another layout."""


class Answer(enum.Enum):
    """Whether the next kernel reads what this one writes."""

    same = "same"
    different = "different"
    unknown = "unknown"


@dataclass(frozen=True)
class Understood:
    """The answer, and why; `unread` names formats that only a module may read, which no image shows."""

    answer: Answer
    why: str
    unread: tuple[str, ...] = ()


def understood(written: Written, kernel: Kernel) -> Understood:
    """Hold each format of the running kernel's trees against those the image knows."""
    if kernel.page_size not in (0, mmap.PAGESIZE):
        # kho_radix_encode_key() keys the preserved pages by PAGE_SHIFT (include/linux/kho/abi/kexec_handover.h, 7.3),
        # memfd and LUO count in pages, and kho_populate() compares `compatible` alone.
        ours, its = (f"{size >> 10} KiB" for size in (mmap.PAGESIZE, kernel.page_size))
        return Understood(Answer.different, f"its pages have {its}, this kernel's {ours}, and KHO counts in pages")
    if kernel.opaque:
        return Understood(Answer.unknown, f"its code cannot be looked at: {kernel.opaque}")
    reads = sorted(known for known in kernel.compatible if family(known) == "kho")
    if not reads or (kernel.config is not None and not is_set(kernel.config, "CONFIG_KEXEC_HANDOVER")):
        return Understood(Answer.different, "it was built without Kexec HandOver (CONFIG_KEXEC_HANDOVER)")
    if not written.root:
        return Understood(
            Answer.unknown, f"the running kernel does not show which format it writes; it reads {', '.join(reads)}"
        )
    if written.root not in kernel.compatible:
        return Understood(Answer.different, f"this kernel writes {written.root}, it reads {', '.join(reads)}")
    if written.v3 is not (V3_MARK in kernel.marks) and written.root == "kho-v1":
        ours, its = ("v3's", "mainline's") if written.v3 else ("mainline's", "v3's")
        return Understood(
            Answer.different, f"both call it {written.root}, and this kernel writes {ours}, it reads {its}"
        )
    return _blobs(written, kernel)


def _blobs(written: Written, kernel: Kernel) -> Understood:
    wrong, unread = [], []
    families = {family(known) for known in kernel.compatible}
    for name, formats in written.blobs.items():
        for one in sorted(formats - kernel.compatible):
            if family(one) in families:
                others = sorted(known for known in kernel.compatible if family(known) == family(one))
                wrong.append(f"{name} is written in {one}, it reads {', '.join(others)}")
            elif family(one) in BUILT_IN or family(one).startswith("luo"):
                wrong.append(f"{name} is written in {one}, which it does not know")
            else:
                unread.append(one)
    if wrong:
        return Understood(Answer.different, "; ".join(wrong), tuple(unread))
    same = sorted({written.root, *(one for formats in written.blobs.values() for one in formats)} - set(unread))
    return Understood(Answer.same, f"both speak {', '.join(same)}", tuple(unread))


def family(compatible: str) -> str:
    """The name without its version: `kho` of kho-v4."""
    return re.sub(r"-v[0-9]+$", "", compatible)
