# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options that choose the next kernel and its command line: one set for check, plan and kexec."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from khoctl.candidates import complete_entries, complete_images, complete_initrds, complete_kernels

WAYS = ("image", "entry", "default", "kernel")
"""The options that choose a kernel; at most one of them is given."""
LINES = ("cmdline", "reuse_cmdline", "append", "remove")
"""The options that make up its command line."""
PROOFS = ("signature", "initrd_signature", "sha256")
"""The options that say who made its files."""


@dataclass(frozen=True, kw_only=True)
class NextKernelOptions:
    """The operator's choice of the next kernel, in the order of the help; a field has the name of its option."""

    image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The next kernel; a unified kernel image brings its initrd along.",
            autocompletion=complete_images,
        ),
    ] = None
    initrd: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Its initrd; several follow one another in this order.",
            autocompletion=complete_initrds,
        ),
    ] = None
    entry: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Boot what this boot loader entry says.",
            autocompletion=complete_entries,
        ),
    ] = None
    default: Annotated[bool, typer.Option("--default", help="Boot the boot loader's default entry.")] = False
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION", help="Boot an installed kernel, by its version.", autocompletion=complete_kernels
        ),
    ] = None
    cmdline: Annotated[
        str | None,
        typer.Option(
            help="Its command line. Without it the entry's or the unified image's own counts, then the running "
            "kernel's, without BOOT_IMAGE=, initrd= and the other words that must not be reused."
        ),
    ] = None
    reuse_cmdline: Annotated[
        bool, typer.Option("--reuse-cmdline", help="Use the running kernel's command line in any case.")
    ] = False
    append: Annotated[str | None, typer.Option(help="Words to add to the command line.")] = None
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="Take a parameter (console), or one word (console=ttyS0), away."),
    ] = None
    signature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A detached signature of the image, which must be good. Without it those beside the image are used: "
            ".asc, .sig, .gpg, .minisig.",
        ),
    ] = None
    initrd_signature: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="The same of an initrd; several are for the initrds in their order."),
    ] = None
    sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="DIGEST", help="The image and each initrd must have one of these digests (SHA-256)."),
    ] = None

    def select_given(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the given options among `names`, with their values.

        An empty string counts as given; a flag that is off and an empty list do not.
        """
        return {name: value for name in names if (value := getattr(self, name)) not in (None, False, [])}


NAMES = tuple(field.name for field in fields(NextKernelOptions))
