"""Kernel and initrd images small enough for a test, laid out as their documents say."""

import struct

CMDLINE_SIZE = 2047  # what x86 kernels name; without the NUL


def bzimage(*, size: int = 0x4000, cmdline_size: int = CMDLINE_SIZE, version: bytes = b"6.8.0-next (b@h) #1") -> bytes:
    """A bzImage by Documentation/arch/x86/boot.rst; with arm64's magic too, so that both machines know it."""
    sectors = 4
    image = bytearray(max(size, (sectors + 1) * 512))
    image[0x38:0x3C] = b"ARM\x64"
    image[0x1F1] = sectors
    struct.pack_into("<I", image, 0x1F4, (len(image) - (sectors + 1) * 512) // 16)  # syssize, in paragraphs
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020F)
    struct.pack_into("<H", image, 0x20E, 0x300 - 0x200)
    image[0x300 : 0x300 + len(version) + 1] = version + b"\0"
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<I", image, 0x260, 1 << 24)
    return bytes(image)


CPIO = b"070701" + b"0" * 104 + b"TRAILER!!!\0"
