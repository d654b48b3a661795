"""GRUB's environment block, and the variables that GRUB's own boot loader entries (Fedora's and its kin's) refer to."""

import re
from collections.abc import Mapping
from pathlib import Path

from khod.errors import Refused

PLACES = ("boot/grub2/grubenv", "boot/grub/grubenv", "efi/EFI/*/grubenv", "boot/efi/EFI/*/grubenv")
SIZE = 64 * 1024
"""The most that is read, in bytes: GRUB's own block is 1 KiB."""
OPTIONAL = frozenset({"tuned_params", "tuned_initrd", "early_initrd", "extra_cmdline"})
"""What an entry may name though nobody set it: empty then, as GRUB has it."""
# A value is never given back once it is read, and a backslash at the very end ends it: else a block of lines that go
# on would be tried from each of them.
_SETTING = re.compile(r"^([^#=\n]+)=((?:\\.|[^\\\n])*+)\\?$", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))", re.ASCII)


def read(root: Path) -> dict[str, str]:
    """The variables of the first environment block below `root`, none where there is no block that can be read."""
    for path in (found for place in PLACES for found in sorted(root.glob(place))):
        try:
            with path.open("rb") as file:
                text = file.read(SIZE).decode("utf-8", "surrogateescape")
        except OSError:
            continue
        return {name: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for name, value in _SETTING.findall(text)}
    return {}


def expand(text: str, variables: Mapping[str, str], where: str) -> str:
    """Put in what `$name` and `${name}` stand for; Refused names one that stands for nothing, `where` says of what.

    GRUB would leave it out without a word; but it may be set in grub.cfg, as `kernelopts` with root= in it is.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in variables and name not in OPTIONAL:
            raise Refused(
                f"${name} is a variable of the boot loader's that no grubenv sets",
                where=where,
                remedy="Name the kernel, the initrd and the command line: --image, --initrd, --cmdline.",
            )
        return variables.get(name, "")

    return _VARIABLE.sub(value, text)
