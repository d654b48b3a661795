"""Tell by content whether a file can be the next kernel, or its initrd, before the kernel is asked."""

import platform
import struct
from dataclasses import dataclass

from khod.errors import Refused
from khod.images.sealed import Sealed

HEADER_SIZE = 0x290
# Documentation/arch/x86/boot.rst: field offsets of the setup header.
SETUP_SECTS, SYSSIZE, BOOT_FLAG, HDRS, VERSION = 0x1F1, 0x1F4, 0x1FE, 0x202, 0x206
KERNEL_VERSION, CMDLINE_SIZE, INIT_SIZE = 0x20E, 0x238, 0x260
SECTOR, PARAGRAPH = 512, 16
ARM64_MAGIC = (0x38, b"ARM\x64")  # Documentation/arch/arm64/booting.rst

COMMAND_LINE_SIZE = 2048  # arm64, riscv64; s390x and ppc64le take more

PADDING = 4096
INITRD_MAGIC = {
    b"070701": "cpio",
    b"070702": "cpio",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x02\x21\x4c\x18": "lz4",
    b"BZh": "bzip2",
    b"\x5d\0\0": "lzma",
    b"\x89LZO": "lzo",
}


@dataclass(frozen=True)
class Kernel:
    """What a kernel image says of itself.

    `version` is "" where it has none; `cmdline_limit` is the longest command line it takes and
    `init_size` the memory it needs to start, both in bytes.
    """

    format: str
    version: str
    cmdline_limit: int
    init_size: int


def kernel(image: Sealed, machine: str = platform.machine()) -> Kernel:
    """Look at an image; Refused with what is wrong where this machine's loader will not take it."""
    if machine == "x86_64":
        return _bzimage(image)
    if machine == "aarch64":
        offset, magic = ARM64_MAGIC
        if image.head(offset + len(magic))[offset:] != magic:
            raise _no_kernel(image, "an arm64 Image")
    return Kernel("Image", "", COMMAND_LINE_SIZE - 1, image.size)


def _bzimage(image: Sealed) -> Kernel:
    head = image.head(HEADER_SIZE)
    if len(head) < HEADER_SIZE or head[HDRS : HDRS + 4] != b"HdrS" or head[BOOT_FLAG : BOOT_FLAG + 2] != b"\x55\xaa":
        raise _no_kernel(image, "a bzImage")
    (syssize,) = struct.unpack_from("<I", head, SYSSIZE)
    promised = (head[SETUP_SECTS] or 4) * SECTOR + SECTOR + syssize * PARAGRAPH
    if image.size < promised:
        raise Refused(
            f"The image is truncated: {image.size} of the {promised} bytes its header names are there",
            where=image.name,
            remedy="Copy the kernel image again.",
        )
    (at,) = struct.unpack_from("<H", head, KERNEL_VERSION)
    version = image.head(at + SECTOR + 256)[at + SECTOR :].split(b"\0")[0].decode(errors="replace") if at else ""
    (cmdline_limit,) = struct.unpack_from("<I", head, CMDLINE_SIZE)
    (init_size,) = struct.unpack_from("<I", head, INIT_SIZE)
    return Kernel("bzImage", version.split(" ")[0], cmdline_limit, init_size)


def _no_kernel(image: Sealed, wanted: str) -> Refused:
    return Refused(
        f"The image is not {wanted}, the format this machine's kexec_file_load(2) takes",
        where=image.name,
        remedy="Give --image a kernel image, for instance /boot/vmlinuz-VERSION.",
    )


def initrd(image: Sealed) -> str:
    """Name an initrd's outer format; Refused where no kernel would unpack it."""
    head = image.head(PADDING).lstrip(b"\0")  # unpack_to_rootfs() skips zeroes between archives, and before the first
    for magic, name in INITRD_MAGIC.items():
        if head.startswith(magic):
            return name
    raise Refused(
        "The initrd is neither a cpio archive nor compressed in a way a kernel knows",
        where=image.name,
        remedy="Give --initrd an initramfs, for instance /boot/initrd.img-VERSION.",
    )
