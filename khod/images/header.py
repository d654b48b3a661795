# SPDX-License-Identifier: LGPL-2.1-or-later
"""The headers of each architecture's kernel image, and what its kexec_file_load(2) accepts.

The formats are in Documentation/arch/{x86/boot,arm64/booting,riscv/boot-image-header}.rst, and for loongarch and s390
in arch/loongarch/include/asm/image.h and arch/s390/include/asm/setup.h.
"""

import struct
from collections.abc import Callable

from khod.dataclass import dataclass
from khod.errors import Refused
from khod.images import elf, pe

# arch/*/kernel/{kexec-bzimage64,kexec_image,kexec_elf,kexec_efi,machine_kexec_file}.c, arch/powerpc/kexec/elf_64.c
LOADS: dict[str, tuple[str, ...]] = {
    "x86_64": ("bzImage",),
    "aarch64": ("Image",),
    "riscv64": ("Image", "vmlinux"),
    "loongarch64": ("vmlinux.efi", "vmlinux"),
    "ppc64le": ("vmlinux",),
    "s390x": ("Image", "vmlinux"),
}
# COMMAND_LINE_SIZE less the NUL; x86 and s390 name their own in the header. loongarch's loader puts `kexec_file` and
# `initrd=START,SIZE` in front.
CMDLINE = {"aarch64": 2047, "riscv64": 1023, "loongarch64": 4095 - 64, "ppc64le": 2047, "s390x": 894}
ELFCOREHDR = 30  # MAX_ELFCOREHDR_STR_LEN, which x86's loader keeps free, also for a load that is not for a crash
SECTOR, PARAGRAPH, MIB2 = 512, 16, 2 << 20

# The setup header, struct setup_header
SETUP_SECTS, SYSSIZE, BOOT_FLAG, HDRS, VERSION, KERNEL_VERSION = 0x1F1, 0x1F4, 0x1FE, 0x202, 0x206, 0x20E
LOADFLAGS, KERNEL_ALIGNMENT, RELOCATABLE_KERNEL, XLOADFLAGS, CMDLINE_SIZE = 0x211, 0x230, 0x234, 0x236, 0x238
PAYLOAD, PREF_ADDRESS, INIT_SIZE = 0x248, 0x258, 0x260
SETUP_END = 0x268
LOADED_HIGH, XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G, XLF_5LEVEL = 1, 1 << 0, 1 << 1, 1 << 5
PROTOCOL = 0x020C

# The 64 bytes that arm64, riscv and loongarch share: text_offset, image_size or similar, and a magic at 56
FLAT, FLAT_MAGIC, FLAGS = 64, slice(56, 60), 24
BIG_ENDIAN = 1  # bit 0 of arm64's flags, and of riscv's
ARM64_PAGE_SIZES = (0, 4096, 16384, 65536)  # bits 1 and 2; 0 if the kernel does not say
ARM64_MAGIC, RISCV_MAGIC, EFI_MAGIC = b"ARM\x64", b"RSC\x05", b"\xcd\x23\x82\x81"
PE_LOONGARCH = 0x6264  # IMAGE_FILE_MACHINE_LOONGARCH64
# s390: the entry's mark, and struct parmarea's kernel_version and max_command_line_size
S390_MAGIC, S390_PARMAREA = (0x10008, b"S390EP"), 0x10428
RELEASE = 64  # bytes: __NEW_UTS_LEN


@dataclass(frozen=True)
class Header:
    """A kernel image by its header; the fields are those of `khod.images.kernel.KernelImageInfo`.

    `payload` is the place of the compressed kernel (offset and length in bytes), None if it is not compressed.
    """

    format: str
    arch: str
    cmdline_limit: int
    memory: int
    alignment: int
    version: str = ""
    text_offset: int = 0
    setup_size: int = 0
    payload: tuple[int, int] | None = None
    opaque: str = ""
    pref_address: int = 0
    relocatable: bool = True
    five_level: bool = True
    page_size: int = 0


def read_header(view: memoryview, machine: str, where: str) -> Header | None:
    """Recognise a kernel image, `machine`'s own formats first; None if it is not one, Refused if it is cut off."""
    for reader in sorted(_READERS, key=lambda reader: _READERS[reader] != machine):
        if header := reader(view, where):
            return header
    return None


def check_machine(header: Header, machine: str, where: str) -> None:
    """Raise Refused if `machine`'s kexec_file_load(2) does not accept the image."""
    takes = LOADS.get(machine, ())
    if header.arch != machine:
        raise Refused(
            f"The image is for {header.arch or 'an unknown processor'}, and this machine is {machine}",
            where=where,
            remedy=f"Give `kernel.image` a kernel for {machine}.",
        )
    if header.format not in takes:
        raise Refused(
            f"The image is a {header.format}, and {machine}'s kexec_file_load(2) takes only a {' or a '.join(takes)}",
            where=where,
            remedy=f"Give `kernel.image` the {takes[0]} of the same build, for instance /boot/vmlinuz-VERSION.",
        )


def _read_bzimage(view: memoryview, where: str) -> Header | None:
    if bytes(view[HDRS : HDRS + 4]) != b"HdrS" or bytes(view[BOOT_FLAG : BOOT_FLAG + 2]) != b"\x55\xaa":
        return None
    if len(view) < SETUP_END:
        raise pe.truncated_error("its setup header", SETUP_END, len(view), where)
    (syssize,) = struct.unpack_from("<I", view, SYSSIZE)
    setup_size = (view[SETUP_SECTS] or 4) * SECTOR + SECTOR
    if len(view) < setup_size + syssize * PARAGRAPH:
        raise pe.truncated_error("what its header names", setup_size + syssize * PARAGRAPH, len(view), where)
    _check_bzimage(view, where)
    alignment, xload, cmdline_size = struct.unpack_from("<I2xHI", view, KERNEL_ALIGNMENT)
    offset, length = struct.unpack_from("<II", view, PAYLOAD)
    if setup_size + offset + length > len(view):
        raise pe.truncated_error("its compressed kernel", setup_size + offset + length, len(view), where)
    if alignment & (alignment - 1):  # <asm/boot.h> allows no other, and the loader's ALIGN_DOWN() needs it
        raise Refused(
            f"The image is damaged: its header names an alignment of {alignment:#x}, which is not a power of two",
            where=where,
            remedy="Copy the image again from its package.",
        )
    (at,) = struct.unpack_from("<H", view, KERNEL_VERSION)
    return Header(
        "bzImage",
        "x86_64" if xload & XLF_KERNEL_64 else "i686",
        max(cmdline_size - ELFCOREHDR - 1, 0),
        struct.unpack_from("<I", view, INIT_SIZE)[0],
        alignment,
        _read_release(view[at + SECTOR :]) if at else "",
        setup_size=setup_size,
        payload=(setup_size + offset, length),
        pref_address=struct.unpack_from("<Q", view, PREF_ADDRESS)[0],
        relocatable=bool(view[RELOCATABLE_KERNEL]),
        five_level=bool(xload & XLF_5LEVEL),
    )


def _check_bzimage(view: memoryview, where: str) -> None:
    """Raise Refused if one of bzImage64_probe()'s conditions is not met."""
    (protocol,) = struct.unpack_from("<H", view, VERSION)
    (xload,) = struct.unpack_from("<H", view, XLOADFLAGS)
    wrong = [
        (protocol < PROTOCOL, f"speaks boot protocol {protocol >> 8}.{protocol & 0xFF:02}, older than 2.12"),
        (not view[LOADFLAGS] & LOADED_HIGH, "is a zImage"),
        (not xload & XLF_KERNEL_64, "is not a 64-bit kernel"),
        (not xload & XLF_CAN_BE_LOADED_ABOVE_4G, "cannot be loaded above 4 GiB"),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise Refused(
                f"The image {what}, and x86_64's kexec_file_load(2) does not take it",
                where=where,
                remedy="Give `kernel.image` a 64-bit bzImage of Linux 3.8 or later.",
            )


def _read_arm64(view: memoryview, where: str) -> Header | None:
    if len(view) < FLAT or bytes(view[FLAT_MAGIC]) != ARM64_MAGIC:
        return None
    text_offset, image_size = struct.unpack_from("<QQ", view, 8)
    _require_size(image_size, where)
    flags = _read_flags(view, where)
    return Header(
        "Image",
        "aarch64",
        CMDLINE["aarch64"],
        image_size,
        MIB2,
        text_offset=text_offset,
        page_size=ARM64_PAGE_SIZES[flags >> 1 & 3],
    )


def _read_riscv(view: memoryview, where: str) -> Header | None:
    if len(view) < FLAT or bytes(view[FLAT_MAGIC]) != RISCV_MAGIC:
        return None
    text_offset, image_size = struct.unpack_from("<QQ", view, 8)
    _require_size(image_size, where)
    _read_flags(view, where)
    return Header("Image", "riscv64", CMDLINE["riscv64"], image_size, text_offset, text_offset=text_offset)


def _read_loongarch(view: memoryview, where: str) -> Header | None:
    portable = pe.read_pe(view, where)  # the magic is that of every kernel with an EFI stub, x86's too
    if bytes(view[FLAT_MAGIC]) != EFI_MAGIC or portable is None or portable.machine != PE_LOONGARCH:
        return None
    kernel_asize, text_offset = struct.unpack_from("<QQ", view, 16)
    _require_size(kernel_asize, where)
    return Header("vmlinux.efi", "loongarch64", CMDLINE["loongarch64"], kernel_asize, MIB2, text_offset=text_offset)


def _read_s390(view: memoryview, where: str) -> Header | None:  # noqa: ARG001 - one of the readers
    at, magic = S390_MAGIC
    if len(view) < S390_PARMAREA + 16 or bytes(view[at : at + len(magic)]) != magic:
        return None
    version, limit = struct.unpack_from(">QQ", view, S390_PARMAREA)
    return Header(
        "Image",
        "s390x",
        limit - 2 if limit > 1 else CMDLINE["s390x"],  # the loader refuses one that fills it, its NUL included
        len(view),
        4096,
        _read_release(view[version:]) if version else "",
        opaque="an s390 Image does not say where its compressed kernel lies",
    )


def _read_vmlinux(view: memoryview, where: str) -> Header | None:
    found = elf.read_elf(lambda offset, length: view[offset : offset + length])
    if found is None:
        return None
    if found.end > len(view):
        raise pe.truncated_error("a segment", found.end, len(view), where)
    return Header("vmlinux", found.arch, CMDLINE.get(found.arch, 0), found.memory, found.alignment)


_READERS: dict[Callable[[memoryview, str], Header | None], str] = {
    _read_bzimage: "x86_64",
    _read_arm64: "aarch64",
    _read_riscv: "riscv64",
    _read_loongarch: "loongarch64",
    _read_s390: "s390x",
    _read_vmlinux: "ppc64le",
}


def _require_size(size: int, where: str) -> None:
    """Raise Refused for an Image from before Linux 3.17, which has no size in its header: the loaders refuse it."""
    if size == 0:
        raise Refused(
            "The image's header names no size, and kexec_file_load(2) does not take that",
            where=where,
            remedy="Give `kernel.image` a newer kernel.",
        )


def _read_flags(view: memoryview, where: str) -> int:
    """Return the header's flags; raise Refused for a kernel of the other byte order, which misreads KHO's numbers."""
    (flags,) = struct.unpack_from("<Q", view, FLAGS)
    if flags & BIG_ENDIAN:
        raise Refused(
            "The image is a big-endian kernel, and this one is little-endian: it would read other numbers",
            where=where,
            remedy="Give `kernel.image` a little-endian kernel.",
        )
    return int(flags)


def _read_release(view: memoryview) -> str:
    return bytes(view[: RELEASE + 1]).split(b"\0")[0].split(b" ")[0].decode(errors="replace")
