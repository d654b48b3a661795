# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unpack a kernel image down to what the running kernel's loader accepts, and describe it."""

import enum
import re
import struct
from collections.abc import Iterable

from khod.dataclass import dataclass
from khod.errors import KhoError, Refused
from khod.images import compressed, contents, header, pe, sealed
from khod.images.contents import MARKS, Contents
from khod.images.header import Header
from khod.images.pe import Portable, Section
from khod.images.sealed import Sealed
from khod.images.unpacked import unpack_payload

__all__ = ["MARKS", "KernelImageInfo", "Signature", "UnpackedImage", "unpack_image"]

MAX_LAYERS = 4  # files within files
MODULE_SIGNATURE = b"~Module signature appended~\n"  # include/linux/module_signature.h
# drivers/firmware/efi/libstub/zboot-header.S
ZBOOT, ZBOOT_PAYLOAD = b"MZ\0\0zimg", 8
ZBOOT_NUMBERS = struct.Struct("<II")  # offset and length, in bytes
THIN_SECTION = ".linuxh"  # lanzaboote: the SHA-256 of the file that .linux names
MAX_PROFILES = 2  # the common sections and the first profile
NO_CONTENTS = Contents("", None, frozenset(), frozenset())


class Signature(enum.Enum):
    """How an image is signed: in its PE certificate table, or appended after its end, like a module."""

    none = "none"
    pe = "pe"
    appended = "appended"


@dataclass(frozen=True)
class KernelImageInfo:
    """What a kernel image says about itself, in the form that the running kernel's loader will be given.

    `format` is bzImage, Image (arm64, riscv, s390), vmlinux.efi (loongarch) or vmlinux; `arch` is as in uname -m,
    `version` as in uname -r ("" if it has none). In bytes: `cmdline_limit`, what this architecture's loader allows,
    without the NUL; `size` of the file; `setup_size` of x86's real-mode part, which is not in the kernel's segment;
    `memory` it needs to start (x86 init_size, image_size, the span of an ELF's PT_LOADs); `alignment`; `text_offset`
    (arm64, riscv, loongarch). `config` is the embedded configuration (IKCONFIG), `compatible` the KHO formats it knows,
    `marks` which of MARKS it has; if `opaque` is not "", it says why none of these three is known.

    From x86's header: `pref_address`, below which it is not placed; `relocatable`, whether it may run elsewhere;
    `five_level`, whether it can be started with five levels of page tables. `page_size` in bytes is that of arm64's
    header or of the configuration, 0 if neither has it. `banner` is the content of /proc/version in that kernel ("" if
    it was not found); it differs between two builds of one version.
    """

    format: str
    arch: str
    version: str
    cmdline_limit: int
    size: int
    setup_size: int
    memory: int
    alignment: int
    text_offset: int
    signature: Signature
    config: str | None
    compatible: frozenset[str]
    marks: frozenset[str]
    opaque: str
    pref_address: int = 0
    relocatable: bool = True
    five_level: bool = True
    page_size: int = 0
    banner: str = ""


@dataclass(frozen=True)
class UnpackedImage:
    """One unpacked file: what the loader is given, and what came with it. It owns its descriptors.

    `formats` are from the outside in, for instance ("UKI", "bzImage"), ("zboot zstd", "Image"). `initrd`, `cmdline`,
    `osrel` and `uname` are those of a unified kernel image, None and "" without one.
    """

    formats: tuple[str, ...]
    kernel: Sealed
    initrd: Sealed | None
    cmdline: str | None
    osrel: str
    uname: str
    about: KernelImageInfo

    def close(self) -> None:
        """Free the memory."""
        self.kernel.close()
        if self.initrd is not None:
            self.initrd.close()


def unpack_image(image: Sealed, machine: str, limit: int) -> UnpackedImage:
    """Unpack an image as far as kexec_file_load(2) of `machine` (uname -m) needs, and examine the kernel in it.

    `limit` is the maximum number of unpacked bytes. The result then owns `image`. Refused is raised if this machine's
    loader does not accept the image or it is damaged; `image` then stays the caller's.
    """
    formats: list[str] = []
    kernel, parts, initrd = image, dict[str, memoryview](), None
    try:
        while True:
            view = kernel.view()
            portable = pe.read_pe(view, image.name)
            parts = parts or _uki_sections(view, portable)
            layer = _outer_layer(view, portable, image.name, limit)
            if layer is None:
                break
            if len(formats) == MAX_LAYERS:
                raise Refused(f"More than {MAX_LAYERS} files lie within each other", where=image.name, remedy=_ANOTHER)
            formats.append(layer[0])
            outer, kernel = kernel, sealed.seal_pieces(layer[1], image.name)
            if outer is not image:
                outer.close()
        about = _describe_kernel(view, portable, machine, image.name, limit)
        initrd = _join_initrd(parts, image.name)
    except BaseException:
        if kernel is not image:
            kernel.close()
        raise
    if kernel is not image:
        image.close()
    cmdline = _command_line(parts[".cmdline"]) if ".cmdline" in parts else None
    return UnpackedImage(
        (*formats, about.format),
        kernel,
        initrd,
        cmdline,
        _section_text(parts, ".osrel"),
        _section_text(parts, ".uname"),
        about,
    )


_ANOTHER = "Give `kernel.image` a kernel image, for instance /boot/vmlinuz-VERSION."


def _outer_layer(
    view: memoryview, portable: Portable | None, where: str, limit: int
) -> tuple[str, Iterable[bytes | memoryview]] | None:
    """Return the name of the outer format and the contents in pieces; None if no other file is inside."""
    parts = _uki_sections(view, portable)
    if (linux := parts.get(".linux")) is not None:
        if THIN_SECTION in parts:
            raise _thin_error(parts, where)
        return "UKI", [linux]
    if bytes(view[: len(ZBOOT)]) == ZBOOT and portable is not None:
        offset, size = ZBOOT_NUMBERS.unpack_from(view, ZBOOT_PAYLOAD)
        if offset + size > len(view):
            raise pe.truncated_error("its compressed kernel", offset + size, len(view), where)
        packed = view[offset : offset + size]
        method = compressed.recognise_method(bytes(packed[: compressed.HEAD_BYTES]))
        return f"zboot {method}".rstrip(), compressed.unpack_stream(method, packed, limit, where)
    if method := compressed.recognise_method(bytes(view[: compressed.HEAD_BYTES])):
        return method, compressed.unpack_stream(method, view, limit, where)
    return None


def _uki_sections(view: memoryview, portable: Portable | None) -> dict[str, memoryview]:
    """Return a unified kernel image's sections by name, as systemd-stub uses them; none if it is not such an image.

    If it has several profiles (.profile begins each), the first is started: its own sections take precedence over the
    common ones.
    """
    common, first = dict[str, Section](), dict[str, Section]()
    if portable is not None:
        profiles = 0
        for section in portable.sections:
            profiles += section.name == ".profile"
            if profiles < MAX_PROFILES:
                (first if profiles else common).setdefault(section.name, section)
    parts = common | first
    if ".linux" not in parts:
        return {}
    return {name: view[section.offset : section.offset + section.size] for name, section in parts.items()}


def _section_text(parts: dict[str, memoryview], name: str) -> str:
    return bytes(parts.get(name, b"")).decode(errors="replace").strip("\0 \n")


def _command_line(section: memoryview) -> str:
    """Return a unified kernel image's command line as systemd-stub passes it on; it may be a file of several lines.

    It ends at a NUL; each control character becomes a space, and those at the ends are removed: mangle_stub_cmdline()
    in src/boot/util.c.
    """
    text = bytes(section).decode(errors="replace").partition("\0")[0]
    return "".join(" " if char <= " " or char == "\x7f" else char for char in text).strip(" ")


def _thin_error(parts: dict[str, memoryview], where: str) -> Refused:
    """Return the refusal of an image whose sections are paths on its own file system (lanzaboote's stub, thin.rs)."""
    kernel, initrd = (_section_text(parts, name).replace("\\", "/") for name in (".linux", ".initrd"))
    return Refused(
        f"The image is a thin one, which holds no kernel and names {kernel} on its file system",
        where=where,
        remedy=f"Give its boot loader entry, or these two from there, with `kernel.cmdline`: "
        f"`kernel.image={kernel}` `kernel.initrds={initrd}`",
    )


def _join_initrd(parts: dict[str, memoryview], where: str) -> Sealed | None:
    """Join the microcode and the initrd, as systemd-stub does."""
    microcode, initrd = parts.get(".ucode", memoryview(b"")), parts.get(".initrd", memoryview(b""))
    if not microcode and not initrd:
        return None
    return sealed.seal_pieces([microcode, bytes(-len(microcode) % sealed.ALIGNMENT), initrd], f"{where}: .initrd")


def _describe_kernel(
    view: memoryview, portable: Portable | None, machine: str, where: str, limit: int
) -> KernelImageInfo:
    found = header.read_header(view, machine, where)
    if found is None:
        raise Refused("The image is not a kernel of a kind khod knows", where=where, remedy=_ANOTHER)
    header.check_machine(found, machine, where)
    opaque, inside = found.opaque, NO_CONTENTS
    if not opaque:
        try:
            inside = _scan_contents(view, found, where, limit)
        except KhoError as error:
            opaque = error.what
    return KernelImageInfo(
        found.format,
        found.arch,
        found.version or inside.version,
        found.cmdline_limit,
        len(view),
        found.setup_size,
        found.memory,
        found.alignment,
        found.text_offset,
        _signature_kind(view, portable),
        inside.config,
        inside.compatible,
        inside.marks,
        opaque,
        found.pref_address,
        found.relocatable,
        found.five_level,
        found.page_size or _page_size(inside.config or ""),
        inside.banner,
    )


def _page_size(config: str) -> int:
    """Return the page size in a configuration (CONFIG_PAGE_SHIFT, on every architecture since 6.9), or 0."""
    found = re.search(r"^CONFIG_PAGE_SHIFT=([0-9]{1,2})$", config, re.MULTILINE)
    return 1 << int(found[1]) if found else 0


def _signature_kind(view: memoryview, portable: Portable | None) -> Signature:
    if portable is not None and portable.certificates:
        return Signature.pe
    return Signature.appended if bytes(view[-len(MODULE_SIGNATURE) :]) == MODULE_SIGNATURE else Signature.none


def _scan_contents(view: memoryview, head: Header, where: str, limit: int) -> Contents:
    """Examine the kernel's code and data, unpacked in memory if they are compressed; raise Refused if that fails."""
    if head.payload is None:
        return contents.scan_image(lambda offset, length: view[offset : offset + length], len(view), where)
    offset, length = head.payload
    packed = view[offset : offset + length]
    said = int.from_bytes(packed[-4:], "little")  # scripts/Makefile.lib: size_append
    whole = unpack_payload(packed, said, limit, where)
    if whole.size & 0xFFFFFFFF != said:
        raise Refused(
            f"Its code unpacks to {whole.size} bytes, and its build noted {said}", where=where, remedy=_ANOTHER
        )
    found = contents.scan_image(whole.read_at, whole.size, where)
    whole.check_rest()
    return found
