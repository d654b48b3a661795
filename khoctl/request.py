# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel as it is asked for on the command line, made into a call's parameters and open files."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from khoctl import profile
from khoctl.layout import show_page
from khod.errors import UsageError
from khod.files import open_regular
from khod.text import printable

WAYS = ("image", "entry", "default", "kernel")
"""The ways to say which kernel: one of them."""
FLAGS = ("now", "load_only", "hold")
"""What a profile may say beside that; a command that has no such option leaves it out."""
LINES = ("cmdline", "reuse_cmdline", "append", "remove")


def build_request(given: Mapping[str, Any], files: ExitStack) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The parameters of Check, Plan or Kexec, and the descriptors they name; `files` closes these.

    Raises UsageError where what was asked contradicts itself or a file cannot be opened, Refused where an entry
    cannot be booted.
    """
    wanted = _with_profile(given)
    _check_conflicts(wanted)
    flags = {name: True for name in FLAGS if name in given and wanted.get(name)}
    if not any(wanted[way] for way in WAYS):
        return flags, ()
    kernel, initrds, cmdline = _resolve_source(wanted)
    fds: list[int] = []

    def opened(path: str, role: str) -> int:
        fd = open_regular(path, role)
        files.callback(os.close, fd)
        fds.append(fd)
        return len(fds) - 1

    about: dict[str, Any] = {"image": opened(kernel, "image"), "image_name": kernel}
    about |= {"initrds": [opened(path, "initrd") for path in initrds], "initrd_names": list(initrds)}
    about |= {name: wanted[name] for name in LINES if wanted[name]}
    line = wanted["cmdline"] if wanted["cmdline"] is not None or wanted["reuse_cmdline"] else cmdline
    if line is not None:
        about["cmdline"] = line  # an empty one is one
    return {**flags, "kernel": about}, tuple(fds)


def _with_profile(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says, over what the profile says; a kernel named here replaces the profile's."""
    if given["from_profile"] is None:
        return dict(given)
    kept = profile.load_profile(given["from_profile"])
    said = {name: value for name, value in given.items() if value}
    if any(way in said for way in WAYS):
        kept = {name: value for name, value in kept.items() if name not in (*WAYS, "initrd")}
    return {**given, **kept, **said}


def _check_conflicts(wanted: Mapping[str, Any]) -> None:
    ways = [way for way in WAYS if wanted[way]]
    if len(ways) > 1:
        names = " and ".join(f"--{way}" for way in ways)
        raise UsageError(f"{names} each name a kernel", remedy="Give one of them.")
    if wanted["reuse_cmdline"] and wanted["cmdline"] is not None:
        raise UsageError("--cmdline and --reuse-cmdline contradict each other", remedy="Give one of them.")
    if not ways and wanted["initrd"]:
        raise UsageError("An initrd without an image", where="--initrd", remedy="Add --image.")
    if not ways and any(wanted[name] for name in LINES):
        raise UsageError("A command line without an image", where="--cmdline/--append", remedy="Add --image.")


def _resolve_source(wanted: Mapping[str, Any]) -> tuple[str, list[str], str | None]:
    """Kernel, initrds and the command line an entry brings; initrds given besides come after the entry's own."""
    given = [str(path) for path in wanted["initrd"] or ()]
    from khoctl.boot import sources  # noqa: PLC0415 - only a kernel's name needs it

    if wanted["image"]:
        _print_note(sources.image_note(wanted["image"]))
        return str(wanted["image"]), given, None
    found = (
        sources.source_of_version(wanted["kernel"]) if wanted["kernel"] else sources.source_of_entry(wanted["entry"])
    )
    _print_note(found.note)
    return str(found.kernel), [*map(str, found.initrds), *given], found.cmdline


def _print_note(note: str) -> None:
    if note:
        show_page(f"khoctl: {printable(note)}", err=True)
