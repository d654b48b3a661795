# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turn the next kernel of the command line into the parameters and open files of a call."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from khoctl.layout import show_page
from khoctl.next_kernel import LINES, NAMES, PROOFS, WAYS, NextKernelOptions
from khod.errors import UsageError
from khod.files import open_regular
from khod.text import printable

if TYPE_CHECKING:
    from khoctl.profile import Profile

SUFFIXES = (".asc", ".sig", ".gpg", ".minisig")
"""The names of detached signatures that lie beside their file."""


@dataclass(frozen=True)
class _Signature:
    """A file with a detached signature of the image, or of the initrd with this number."""

    path: str
    initrd: int | None
    required: bool = False


@contextmanager
def open_request(
    options: NextKernelOptions,
    profile: "Profile | None",
    *,
    now: bool | None = None,
    load_only: bool | None = None,
    hold: bool | None = None,
    terms: Mapping[str, Any] | None = None,
) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield the parameters of Check, Plan or Kexec and the descriptors they name, which stay open during the call.

    A flag is None if the command has no such option; the profile's value is then left out. `terms` are those of the
    profile. Raises UsageError if the options contradict each other or a file cannot be opened, ConfigError if the
    profile names one that is gone, Refused if an entry cannot be booted.
    """
    flags = {"now": now, "load_only": load_only, "hold": hold}
    kept: frozenset[str] = frozenset()
    if profile is not None:
        options, kept = _merge_options(options, profile.options), profile.flags
        profile.check_files(options)
    _check_conflicts(options)
    parameters: dict[str, Any] = {
        name: True for name, given in flags.items() if given or (given is not None and name in kept)
    }
    if terms:
        parameters["terms"] = dict(terms)
    fds: tuple[int, ...] = ()
    with ExitStack() as files:
        if options.select_given(WAYS):
            parameters["kernel"], fds = _open_kernel(options, files)
        yield parameters, fds


def _open_kernel(options: NextKernelOptions, files: ExitStack) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the parameter `kernel` and the descriptors it names; `files` closes them."""
    kernel, initrds, cmdline = _resolve_source(options)
    fds: list[int] = []

    def opened(path: str, role: str) -> int:
        fd = open_regular(path, role)
        files.callback(os.close, fd)
        fds.append(fd)
        return len(fds) - 1

    about: dict[str, Any] = {"image": opened(kernel, "image"), "image_name": kernel}
    about |= {"initrds": [opened(path, "initrd") for path in initrds], "initrd_names": initrds}
    signatures = list(_find_signatures(options, kernel, initrds))
    if signatures:
        about["signatures"] = [
            {"file": opened(one.path, "signature"), "name": one.path, "initrd": one.initrd, "required": one.required}
            for one in signatures
        ]
    about |= options.select_given((*LINES, "sha256"))
    line = options.cmdline if options.cmdline is not None or options.reuse_cmdline else cmdline
    if line is not None:
        about["cmdline"] = line  # an empty one counts as given
    return about, tuple(fds)


def _merge_options(said: NextKernelOptions, kept: NextKernelOptions) -> NextKernelOptions:
    """Merge the command line over the profile; a kernel on the command line replaces the profile's."""
    if said.select_given(WAYS):
        kept = replace(
            kept,
            image=None,
            initrd=None,
            entry=None,
            default=False,
            kernel=None,
            signature=None,
            initrd_signature=None,
        )
    return replace(kept, **said.select_given(NAMES))


def _check_conflicts(options: NextKernelOptions) -> None:
    ways = options.select_given(WAYS)
    if len(ways) > 1:
        names = " and ".join(f"--{way}" for way in ways)
        raise UsageError(f"{names} each name a kernel", remedy="Give one of them.")
    if options.reuse_cmdline and options.cmdline is not None:
        raise UsageError("--cmdline and --reuse-cmdline contradict each other", remedy="Give one of them.")
    if not ways and options.initrd:
        raise UsageError("An initrd without an image", where="--initrd", remedy="Add --image.")
    if not ways and options.select_given(LINES):
        raise UsageError("A command line without an image", where="--cmdline/--append", remedy="Add --image.")
    if not ways and options.select_given(PROOFS):
        raise UsageError("A signature or a digest without an image", where="--signature", remedy="Add --image.")


def _resolve_source(options: NextKernelOptions) -> tuple[str, list[str], str | None]:
    """Return the kernel, the initrds and the entry's command line; `--initrd` comes after the entry's own initrds."""
    given = options.initrd or []
    from khoctl.boot import sources  # noqa: PLC0415 - only a kernel's name needs it

    if options.image is not None:
        _print_note(sources.image_note(options.image))
        return options.image, given, None
    version, entry = options.kernel, options.entry
    found = sources.source_of_entry(entry) if version is None else sources.source_of_version(version)
    _print_note(found.note)
    return str(found.kernel), [*map(str, found.initrds), *given], found.cmdline


def _find_signatures(options: NextKernelOptions, kernel: str, initrds: list[str]) -> Iterator[_Signature]:
    """Yield the signatures that were given, and for a file without one those that lie beside it."""
    given = options.initrd_signature or []
    if len(given) > len(initrds):
        raise UsageError(
            f"{len(given)} signatures for {len(initrds)} initrds",
            where="--initrd-signature",
            remedy="Give no more signatures than initrds.",
        )
    if options.signature:
        yield from (_Signature(path, None, required=True) for path in options.signature)
    else:
        yield from (_Signature(path, None) for path in _list_signatures_beside(kernel))
    for number, initrd in enumerate(initrds):
        if number < len(given):
            yield _Signature(given[number], number, required=True)
        else:
            yield from (_Signature(path, number) for path in _list_signatures_beside(initrd))


def _list_signatures_beside(path: str) -> list[str]:
    """Return the signatures beside a file, and beside the one that a link leads to."""
    places = dict.fromkeys((path, os.path.realpath(path)))
    return [f"{place}{suffix}" for place in places for suffix in SUFFIXES if os.path.isfile(f"{place}{suffix}")]


def _print_note(note: str) -> None:
    if note:
        show_page(f"khoctl: {printable(note)}", err=True)
