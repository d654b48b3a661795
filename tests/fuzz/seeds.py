# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole files of the corpus as they were made: `python -m tests.fuzz.seeds` makes them again.

They are kept as files, so that a number means the same case with any version of libfdt and of the compressors.
"""

import struct

import libfdt

from khod.simulated.kernel import build_tree
from tests.fuzz.corpus import PLACE
from tests.unit import generated
from tests.unit.images import CPIO, PACK, bzimage, code, cpio, flat, portable, vmlinux, zboot

OSREL = b'ID=debian\nPRETTY_NAME="Debian GNU/Linux"\nVERSION_ID="13"\n'
GRUBENV = b"# GRUB Environment Block\nsaved_entry=a\nkernelopts=root=UUID=1 ro\nmenu_auto_hide=1\n".ljust(1024, b"#")
FEDORA = b"title Fedora Linux (6.12) 41\nversion 6.12\nlinux /vmlinuz-6.12\ninitrd /initramfs-6.12.img $tuned_initrd\n"


def trees() -> dict[str, bytes]:
    """What the kernel's producers write, structures that are no tree, and trees by chance."""
    number = struct.pack("=Q", 0x1_0000_0000)
    mainline: dict[str, bytes] = {"preserved-memory-map": number}
    blobs = {"memblock": {"preserved-data": number, "blob-size": number}, "luo": {"fdt": number}}
    memfd = {"pos": bytes(8), "size": number, "nr_folios": number, "folios": bytes(16), "seals": bytes(4)}
    made = {
        "v3.dtb": build_tree(4),
        "v3-many-ranges.dtb": build_tree(100),
        "kho-v4.dtb": _tree("kho-v4", mainline, blobs),
        "luo-v1.dtb": _tree(
            "luo-v1",
            {"liveupdate-number": number, "luo-abi-header": number},
            {"luo-session": {"luo-session-header": number}},
        ),
        "memfd-v1.dtb": _tree("memfd-v1", memfd, {}),
        "reserve-mem-v1.dtb": _tree("reserve-mem-v1", {"start": number, "size": number}, {}),
        "kho-test-v1.dtb": _tree(
            "kho-test-v1",
            {"magic": bytes(4)},
            {"0": {"nr_folios": bytes(4), "folios_info": bytes(16), "csum": bytes(4)}},
        ),
        "kexec-metadata.bin": struct.pack("=I65sI", 1, b"6.18.15", 3),
        "luo-ser.bin": struct.pack("=8sQQQ", b"luo-v5", 1, 0x1000, 0x2000),
    }
    return made | {f"generated-{seed}.dtb": generated.tree(seed) for seed in (8, 20, 28, 33, 47, 79, 98, 110)}


def images() -> dict[str, bytes]:
    """Every format of every machine, and every compression, around the same few strings."""
    inner = code(formats=("kho-v4", "memblock-v1", "luo-v5"), marks=())
    arm, bz = flat("aarch64", inner), bzimage(size=0, contents=inner)
    parts = [
        (".osrel", OSREL),
        (".cmdline", b"quiet root=/dev/vda\n"),
        (".uname", b"6.8.0"),
        (".ucode", CPIO),
        (".initrd", CPIO),
    ]
    s390 = bytearray(0x10440)
    s390[0x10008:0x1000E] = b"S390EP"
    struct.pack_into(">QQ", s390, 0x10428, 0x200, 4096)
    s390[0x200:0x210] = b"6.12.1-s390x (b)"
    profiles = [*parts, (".profile", b"ID=one"), (".linux", bz), (".profile", b"ID=two"), (".cmdline", b"two")]
    made = {f"x86_64.bzimage-{method}": bzimage(size=0, contents=inner, method=method) for method in PACK}
    made |= {f"aarch64.zboot-{method}": zboot(arm, method) for method in PACK}
    made |= {f"aarch64.image-{method}": PACK[method](arm) for method in PACK}
    made |= {f"{arch}.image": flat(arch, inner) for arch in ("aarch64", "riscv64", "loongarch64")}
    made |= {
        "x86_64.uki": portable([*parts, (".linux", bz)], certificates=bytes(512)),
        "x86_64.uki-profiles": portable(profiles),
        "x86_64.uki-thin": portable([(".linux", rb"\EFI\nixos\linux.efi"), (".linuxh", bytes(32))]),
        "aarch64.uki-zboot": portable([*parts, (".linux", zboot(arm, "zstd"))], machine=0xAA64),
        "riscv64.vmlinux": vmlinux(243, inner, text=bytes(64)),
        "ppc64le.vmlinux-gzip": PACK["gzip"](vmlinux(21, inner)),
        "s390x.vmlinux": vmlinux(22, inner, order=">"),
        "s390x.image-gzip": PACK["gzip"](bytes(s390)),
    }
    made |= {f"initrd.{method}": PACK[method](CPIO) for method in PACK}
    early = cpio({"kernel/x86/microcode/GenuineIntel.bin": b"microcode"})
    made["initrd.cpio"] = cpio({"bin": b"", "init": b"#!/bin/sh\n", "a" * 200: bytes(300)})
    made["initrd.cpio-crc"] = cpio({"init": b"contents"}, magic=b"070702")
    made["initrd.early-zstd"] = early + bytes(512) + PACK["zstd"](CPIO)
    made["initrd.early-gzip-gzip"] = early + PACK["gzip"](CPIO) + PACK["gzip"](CPIO)
    return made


def entries() -> dict[str, bytes]:
    """What stands around an entry, too: what its variables mean, and what the loader boots by itself."""
    return {
        "entry-fedora": FEDORA + b"options root=UUID=1 ro $kernelopts ${tuned_params} quiet\ngrub_users $grub_users\n",
        "entry-debian": b"title Debian\nversion 6.12\nsort-key debian\nmachine-id 0123456789abcdef0123456789abcdef\n"
        b"options root=/dev/vda1 ro\noptions quiet\nlinux /vmlinuz-6.12\ninitrd /initramfs-6.12.img\n",
        "entry-efi": b"# a comment\n\ntitle  Shell \nefi /shellx64.efi\narchitecture x64\n",
        "grubenv": GRUBENV,
        "grubenv-escaped": b"saved_entry=Fedora Linux (6.12) 41\nkernelopts=root=\\\\\\\n ro\n",
        "grubenv-number": b"saved_entry=1\n",
        "loader": b"timeout 3\ndefault b-*\neditor no\n",
        "loader-saved": b"default @saved\npreferred [ab]?*\n",
        "uki": portable([(".osrel", OSREL), (".cmdline", b"quiet"), (".linux", b"x")]),
        "os-release": OSREL,
    }


def _tree(compatible: str, properties: dict[str, bytes], children: dict[str, dict[str, bytes]]) -> bytes:
    writer = libfdt.FdtSw()
    writer.finish_reservemap()
    writer.begin_node("")
    writer.property_string("compatible", compatible)
    for key, value in properties.items():
        writer.property(key, value)
    for name, below in children.items():
        writer.begin_node(name)
        for key, value in below.items():
            writer.property(key, value)
        writer.end_node()
    writer.end_node()
    made = writer.as_fdt()
    return bytes(made.as_bytearray()[: made.totalsize()])


if __name__ == "__main__":
    for kind, files in (("trees", trees()), ("images", images()), ("entries", entries())):
        (PLACE / "seeds" / kind).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (PLACE / "seeds" / kind / name).write_bytes(data)
