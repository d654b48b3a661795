"""Which formats the running kernel writes its state in: a kernel that reads others takes nothing over.

The old kernel does not warn: 6.19.11 (`kho-v1`) to 7.3.4 (`kho-v4`) loads, boots, and hands over nothing.
"""

import re
from dataclasses import dataclass, field

from khod.abi.calls import Calls
from khod.abi.fdt import MAGIC
from khod.kernel import debugfs
from khod.model import Generation

COMPATIBLE = re.compile(rb"(?<![A-Za-z0-9,_.-])[a-z][a-z0-9]*(?:[,_-][a-z0-9]+)*-v[0-9]+(?=\0)")
"""A `compatible` of KHO's, as it stands in a tree: NAME-vN, ended by NUL."""

ROOT = re.compile(rb"kho-v[0-9]+(?=\0)")

ALWAYS = {Generation.sysfs: "kho-v1", Generation.finalize: "kho-v1"}
"""What the root is written in where no tree shows it before the active phase: v3 and Linux 6.16 to 6.18."""


@dataclass(frozen=True)
class Written:
    """The root tree's `compatible`, "" where nothing shows it, and those of each producer's tree by its name.

    `v3` is whether it is the layout of the v3 series, which calls itself kho-v1 as 6.16 does and is another one.
    """

    root: str
    blobs: dict[str, frozenset[str]] = field(default_factory=dict)
    v3: bool = False


def written(calls: Calls, generation: Generation) -> Written:
    """Read it off the trees; raises OSError.

    Where v3's files stand on top of mainline KHO, mainline carries the state, and its trees count.
    """
    out = f"{debugfs.KHO}/out"
    mainline = calls.exists(out)
    root = ""
    # In a kernel that was reached by a handover `out/fdt` may be absent (7.3.4): what it was handed and took,
    # it also writes. A tree that is cut off (the same kernel) still begins with its compatible.
    for path in (f"{out}/fdt", f"{debugfs.KHO}/in/fdt") if mainline else ():
        if not root and calls.exists(path) and (found := ROOT.search(calls.read(path))):
            root = found[0].decode()
    names = calls.listdir(f"{out}/sub_fdts") if mainline else []
    blobs = {name: _compatible(calls.read(f"{out}/sub_fdts/{name}")) for name in names}
    v3 = generation is Generation.sysfs and not mainline
    return Written(root or ALWAYS.get(generation, ""), {name: found for name, found in blobs.items() if found}, v3)


def _compatible(blob: bytes) -> frozenset[str]:
    """The compatibles of a producer's tree; none of a blob that is no tree, which Linux 7.1 and later have too."""
    if not blob.startswith(MAGIC.to_bytes(4, "big")):
        return frozenset()
    return frozenset(found.decode() for found in COMPATIBLE.findall(blob))
