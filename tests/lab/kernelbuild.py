# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build a kernel of the lab from Debian's source package, and out-of-tree modules against one.

A kernel takes about a quarter of an hour on two cores, and 4 GB of the cache while it is being built.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from tests.lab import cache
from tests.lab.archive import KernelArchive
from tests.lab.errors import LabError
from tests.lab.process import call

FRAGMENT = Path(__file__).parent / "kernel.config"
SIGNED_FRAGMENT = Path(__file__).parent / "kernel-signed.config"
SIGNED = "signed"
ABI = "include/linux/kho/abi"  # where the formats' names stand, since Linux 6.19
KEY, CERTIFICATE = "lab.key", "lab.pem"  # made for one kernel; the certificate's name stands in SIGNED_FRAGMENT
# Without these a kernel is of no use here; whatever else the fragment wants may be missing in one version or another.
NEEDED = (
    "CONFIG_KEXEC_FILE",
    "CONFIG_KEXEC_HANDOVER",
    "CONFIG_DEBUG_FS",
    "CONFIG_TEST_KEXEC_HANDOVER",
    "CONFIG_MODULES",
    "CONFIG_VIRTIO_BLK",
    "CONFIG_VIRTIO_CONSOLE",
    "CONFIG_EXT4_FS",
    "CONFIG_SERIAL_8250_CONSOLE",
    "CONFIG_IKCONFIG",
)
NEEDED_SIGNED = (*NEEDED, "CONFIG_EFI_STUB", "CONFIG_KEXEC_SIG_FORCE", "CONFIG_KEXEC_BZIMAGE_VERIFY_SIG")
# What kbuild wants of a kernel tree to build a module against it: configuration, headers and host programs.
DEVEL = (
    ".config",
    "Makefile",
    "Module.symvers",
    "include",
    "scripts",
    "arch/x86/include",
    "arch/x86/Makefile",
    "arch/x86/Makefile_32.cpu",
    "arch/x86/Makefile.um",
    "arch/x86/entry/syscalls",
    "arch/x86/tools",
    "tools/objtool/objtool",
    "tools/include",
    "tools/scripts",
    "tools/build",
)


def make(tree: Path, *goals: str | Path) -> None:
    """Run make in a kernel tree, on every processor and as politely as can be."""
    call(["nice", "-n", "19", "make", "-C", tree, f"-j{os.cpu_count() or 1}", *goals])


def build(version: str, target: Path, variant: str = "") -> None:
    """Make the directory `target` with bzImage, config and devel.tar.zst of an upstream kernel version.

    The variant `signed` loads signed images alone; its own signature, key and certificate are made here. `luoN` and
    `memfdN` speak another version of that format. LabError, saying which versions there are, if the archive no longer
    has this one.
    """
    signed = variant == SIGNED
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="linux-") as name:
        tarball = KernelArchive().tarball(version, Path(name))
        print(f"building {version} from {tarball.name}", flush=True)
        tree = Path(name) / "tree"
        tree.mkdir()
        call(["tar", "--extract", "--strip-components=1", "--file", tarball, "--directory", tree])
        if signed:
            make_key(tree)
        elif variant:
            change_format(tree, variant)
        configure(tree, signed=signed)
        print(f"configured {tree}; compiling", flush=True)
        make(tree, "bzImage")
        make(tree, "modules")  # a goal of its own: two at once race for the generated headers
        target.mkdir()
        shutil.copy(tree / "arch/x86/boot/bzImage", target / "bzImage")
        if signed:
            for file in (KEY, CERTIFICATE):
                shutil.copy(tree / file, target / file)
            sign(target / "bzImage", tree / KEY, tree / CERTIFICATE)
        shutil.copy(tree / ".config", target / "config")
        pack_devel(tree, target / "devel.tar.zst")


def change_format(tree: Path, variant: str) -> None:
    """Give a format another version in a kernel tree: `luo6` makes every "luo-vN" a "luo-v6". LabError."""
    found = re.fullmatch(r"([a-z]+)([0-9]+)", variant)
    family, number = found.groups() if found else (variant, "")
    changed = 0
    for header in sorted((tree / ABI).glob("*.h")):
        text, count = re.subn(rf'"{family}-v[0-9]+"', f'"{family}-v{number}"', header.read_text())
        header.write_text(text)
        changed += count
    if not changed:
        raise LabError(f"{ABI} has no format that makes the variant {variant} of this kernel")


def make_key(folder: Path) -> None:
    """Make a key to sign images with, and its certificate, in this directory; they protect nothing."""
    subject = ("-subj", "/CN=khod lab, throw-away/", "-days", "36500")
    made = ("-keyout", KEY, "-out", CERTIFICATE)
    call(["openssl", "req", "-new", "-x509", "-sha256", "-newkey", "rsa:2048", "-nodes", *subject, *made], cwd=folder)


def sign(image: Path, key: Path, certificate: Path) -> None:
    """Sign an image with an EFI stub, in place, as for Secure Boot."""
    call(["sbsign", "--key", key, "--cert", certificate, "--output", image, image])


def configure(tree: Path, *, signed: bool = False) -> None:
    """Configure a kernel tree with its fragments over tinyconfig; LabError if something needed did not stay."""
    fragments = [FRAGMENT, SIGNED_FRAGMENT] if signed else [FRAGMENT]
    make(tree, "tinyconfig")
    call(["scripts/kconfig/merge_config.sh", "-m", ".config", *fragments], cwd=tree)
    make(tree, "olddefconfig")
    said = set((tree / ".config").read_text().splitlines())
    if missing := [symbol for symbol in (NEEDED_SIGNED if signed else NEEDED) if f"{symbol}=y" not in said]:
        raise LabError(
            f"{fragments[-1]} does not get {', '.join(missing)} in {tree}: look at what they depend on there"
        )
    text = "\n".join(fragment.read_text() for fragment in fragments)
    wanted = dict(re.findall(r"^(CONFIG_\w+)(=.*)$", text, re.MULTILINE))  # of two lines the later one counts
    dropped = [symbol + value for symbol, value in wanted.items() if symbol + value not in said]
    print(f"not in this version: {' '.join(dropped) or 'nothing'}", flush=True)


def pack_devel(tree: Path, target: Path) -> None:
    """Pack what a module is built against: DEVEL and every Kconfig, without the objects in between."""
    present = [path for path in DEVEL if (tree / path).exists()]
    kconfigs = [str(path.relative_to(tree)) for path in tree.rglob("Kconfig*")]
    call(
        [
            "tar",
            "--create",
            "--zstd",
            "--exclude=*.o",
            "--exclude=*.cmd",
            "--file",
            target,
            "--directory",
            tree,
            *present,
            *kconfigs,
        ]
    )


def build_module(source: Path, devel: Path) -> Path:
    """Build the .ko that the Makefile in `source` makes for the kernel whose packed tree is `devel`, or take it cached.

    It is built in a copy, so the repository stays clean. LabError with what make said if it does not compile, and if
    it makes anything but one module.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    parts: list[str | bytes | Path] = [devel]
    for path in files:
        parts += [str(path.relative_to(source)), path]
    folder = cache.directory() / "modules" / cache.key(parts)
    built = cache.once(folder, lambda path: _compile_module(source, devel, path))
    return next(iter(built.glob("*.ko")))


def _compile_module(source: Path, devel: Path, target: Path) -> None:
    """Build the module in scratch copies and leave it in the directory `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="module-") as name:
        tree, module = Path(name) / "tree", Path(name) / "module"
        tree.mkdir()
        call(["tar", "--extract", "--zstd", "--file", devel, "--directory", tree])
        shutil.copytree(source, module)
        make(tree, f"M={module}", "modules")
        made = list(module.glob("*.ko"))
        if len(made) != 1:
            raise LabError(f"{source} made {len(made)} modules for {devel}, not one")
        target.mkdir()
        shutil.copy(made[0], target)
