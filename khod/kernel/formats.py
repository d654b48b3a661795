# SPDX-License-Identifier: LGPL-2.1-or-later
"""The formats in which the running kernel writes its state; a kernel that reads others takes nothing over.

The old kernel does not warn: from 6.19.11 (`kho-v1`) to 7.3.4 (`kho-v4`) the image loads and boots, and nothing is
handed over.
"""

import platform
import re
from dataclasses import field
from weakref import WeakKeyDictionary

from khod.abi.calls import Calls
from khod.abi.fdt import MAGIC
from khod.abi.liveupdate import LIVEUPDATE
from khod.dataclass import dataclass
from khod.errors import KhoError, Refused
from khod.images import sealed
from khod.images.kernel import KernelImageInfo, unpack_image
from khod.kernel import debugfs
from khod.model import Generation

COMPATIBLE = re.compile(rb"(?<![A-Za-z0-9,_.-])[a-z][a-z0-9]*(?:[,_-][a-z0-9]+)*-v[0-9]+(?=\0)")
"""A `compatible` of KHO in a tree: NAME-vN, ended by NUL."""

ROOT = re.compile(rb"kho-v[0-9]+(?=\0)")

ALWAYS = {Generation.sysfs: "kho-v1", Generation.finalize: "kho-v1"}
"""The format of the root where no tree shows it before the active phase: v3 and Linux 6.16 to 6.18."""

LUO = "LUO"
"""The blob of the Live Update Orchestrator, present from boot if that is on (Linux 6.19 and later)."""

METADATA = "kexec-metadata"
"""The blob with the previous kernel and the number of handovers (7.0 and later); nothing depends on it."""

VERSION = "/proc/version"
IMAGES = ("/boot/vmlinuz-{release}", "/usr/lib/modules/{release}/vmlinuz", "/boot/vmlinux-{release}")
"""Where distributions keep the running kernel's own image."""

MAX_UNPACKED = 1 << 30  # bytes


@dataclass(frozen=True)
class OutgoingFormats:
    """The root tree's `compatible`, "" if nothing shows it, and those of each producer's tree by name.

    `v3` tells whether it is the layout of the v3 series, which is named kho-v1 as in 6.16 but differs. `luo` tells
    whether LUO is on. `own` are all formats that the running kernel's own image knows, None if it was not examined or
    not found: then `not_inspected` says why. `unjudged` are blobs that do not show their format.
    """

    root: str
    blobs: dict[str, frozenset[str]] = field(default_factory=dict)
    v3: bool = False
    luo: bool = False
    own: frozenset[str] | None = None
    not_inspected: str = ""
    unjudged: tuple[str, ...] = ()


def read_formats(calls: Calls, generation: Generation, following: KernelImageInfo | None = None) -> OutgoingFormats:
    """Read the formats from the trees, and what they do not show from the running kernel's own image; raise OSError.

    `following` is the next kernel, which may be the same build again. If v3's files exist on top of mainline KHO,
    mainline carries the state, and its trees are read.
    """
    out = f"{debugfs.KHO}/out"
    mainline = calls.path_exists(out)
    root = ""
    # In a kernel that was reached by a handover `out/fdt` may be absent (7.3.4). Such a kernel writes the format that
    # it was handed and accepted. A tree that is cut off (the same kernel) still begins with its compatible.
    for path in (f"{out}/fdt", f"{debugfs.KHO}/in/fdt") if mainline else ():
        if not root and calls.path_exists(path) and (found := ROOT.search(calls.read_file(path))):
            root = found[0].decode()
    names = calls.list_directory(f"{out}/sub_fdts") if mainline else []
    blobs = {name: _blob_formats(calls.read_file(f"{out}/sub_fdts/{name}")) for name in names}
    v3 = generation is Generation.sysfs and not mainline
    root = root or ALWAYS.get(generation, "")
    shown = {name: formats for name, formats in blobs.items() if formats}
    unjudged = tuple(name for name, formats in blobs.items() if not formats and name not in (LUO, METADATA))
    luo = mainline and (LUO in names or calls.path_exists(LIVEUPDATE))
    if not mainline or (root and not luo):  # nothing is left that only the image could show
        return OutgoingFormats(root, shown, v3, luo, unjudged=unjudged)
    try:
        image = _own_image(calls, {root, *shown.get(LUO, ())} - {""}, following)
    except (KhoError, OSError) as error:
        why = error.what if isinstance(error, KhoError) else str(error)
        return OutgoingFormats(root, shown, v3, luo, not_inspected=why, unjudged=unjudged)
    if luo and LUO not in shown:
        shown[LUO] = _formats_named(image.compatible, "luo")
    if not root and len(roots := _formats_named(image.compatible, "kho")) == 1:
        root = next(iter(roots))
    return OutgoingFormats(root, shown, v3, luo, image.compatible, unjudged=unjudged)


def _blob_formats(blob: bytes) -> frozenset[str]:
    """Return the compatibles of a producer's tree, or the one at the start of a packed struct.

    LUO's blob is such a struct since Linux 7.1. The result is empty for any other blob.
    """
    if blob.startswith(MAGIC.to_bytes(4, "big")):
        return frozenset(found.decode() for found in COMPATIBLE.findall(blob))
    first = COMPATIBLE.match(blob)
    return frozenset({first[0].decode()}) if first else frozenset()


def _formats_named(formats: frozenset[str], name: str) -> frozenset[str]:
    return frozenset(one for one in formats if re.fullmatch(rf"{name}-v[0-9]+", one))


def _own_image(calls: Calls, shown: set[str], following: KernelImageInfo | None) -> KernelImageInfo:
    """Return the running kernel's own image, identified by its banner; raise KhoError or OSError if there is none.

    A banner may be made the same on purpose (KBUILD_BUILD_TIMESTAMP), so an image that does not know the formats in the
    trees is treated as another kernel's.
    """
    banner = calls.read_file(VERSION).decode(errors="replace").strip()
    if following is not None and following.banner == banner and shown <= following.compatible:
        return following
    release = calls.read_file("/proc/sys/kernel/osrelease").decode(errors="replace").strip()
    paths = [path.format(release=release) for path in IMAGES]
    wrong = []
    for path in filter(calls.is_file, paths):
        try:
            image = _prove_image(calls, path, banner)
        except KhoError as error:
            wrong.append(f"{path}: {error.what}")
            continue
        if shown <= image.compatible:
            return image
        wrong.append(f"{path} does not know {' and '.join(sorted(shown - image.compatible))}, which this kernel writes")
    raise Refused(
        "; ".join(wrong) or f"this kernel's own image is not at {' or '.join(paths)}",
        where=VERSION,
        remedy="Put the running kernel's image there.",
    )


def _prove_image(calls: Calls, path: str, banner: str) -> KernelImageInfo:
    """Unpack an image; raise KhoError if it is another kernel's. It is done once in a boot: a banner is one build's."""
    if (known := _PROVEN.get(calls)) is not None and known.banner == banner:
        return known
    image = sealed.seal_pieces([calls.read_file(path)], path)
    try:
        bundle = unpack_image(image, platform.machine(), MAX_UNPACKED)
    except BaseException:
        image.close()
        raise
    bundle.close()
    if bundle.about.banner != banner:
        raise Refused(
            "it is another kernel's, by its banner", where=path, remedy="Put the running kernel's image there."
        )
    _PROVEN[calls] = bundle.about
    return bundle.about


_PROVEN: WeakKeyDictionary[Calls, KernelImageInfo] = WeakKeyDictionary()
"""The running kernel's own image, by the calls it was read with: unpacking one takes a second."""
