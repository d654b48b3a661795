# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel: the request for it, and what khod made of that in memory."""

import platform
from dataclasses import field

from khod.concurrency.worker import Worker
from khod.config import Images
from khod.dataclass import dataclass
from khod.errors import KhoError
from khod.images import initrd, sealed
from khod.images.initrd import Initrd
from khod.images.kernel import UnpackedImage, unpack_image
from khod.images.sealed import Sealed
from khod.kernel import cmdline, kconfig
from khod.model import NO_TERMS, Terms, Word

COMMAND_LINE_SIZE = 2048
"""The limit in bytes, with the NUL, if the image could not be examined; most architectures have this one."""


@dataclass(frozen=True)
class Given:
    """A file that was passed in: its descriptor stays the caller's, its name is for people."""

    fd: int
    name: str


@dataclass(frozen=True)
class Request:
    """A request of `khoctl kexec`; `cmdline` is None if not given, `reuse` requires the running kernel's."""

    kernel: Given | None = None
    initrds: tuple[Given, ...] = ()
    cmdline: str | None = None
    reuse: bool = False
    append: str | None = None
    remove: tuple[str, ...] = ()
    now: bool = False
    load_only: bool = False
    hold: bool = False
    units: tuple[str, ...] = ()
    """The units of systemd in which the caller runs."""
    terms: Terms = NO_TERMS
    """What must hold for the handover; those of an earlier call stay where this one has none."""


@dataclass
class Target:
    """The next kernel, in memory and examined; the attempt that loads it owns it.

    `kernel` and `initrd` are what the loader is given. `wrong` has the error of each unusable part, by the check that
    reports it: an operator may have set that check to warn.
    """

    kernel: Sealed
    apart: UnpackedImage | None = None
    initrd: Sealed | None = None
    initrds: list[Initrd] = field(default_factory=list)
    cmdline: str = ""
    words: list[Word] = field(default_factory=list)
    wrong: dict[str, KhoError] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the name of the image, its release, and the name of the initrd."""
        version = self.apart.about.version if self.apart else ""
        image = f"{self.kernel.name} ({version})" if version else self.kernel.name
        return f"{image} with {self.initrd.name}" if self.initrd else f"{image} without an initrd"

    @property
    def booted_line(self) -> str:
        """The command line it boots with: `cmdline`, and the built-in one if the image shows its configuration."""
        config = self.apart.about.config if self.apart else None
        return self.cmdline if config is None else kconfig.booted_line(config, self.cmdline)

    def close(self) -> None:
        """Free the memory of all images."""
        if self.apart is not None:
            self.apart.close()
        else:
            self.kernel.close()
        if self.initrd is not None and (self.apart is None or self.initrd is not self.apart.initrd):
            self.initrd.close()


async def take_target(worker: Worker, request: Request, running: str, run: str, bounds: Images) -> Target:
    """Build the target in a worker, long before any producer is frozen, because it is slow. It may be cancelled."""
    return await worker.call_within(
        lambda: build_target(request, running, run, bounds), "reading the image", None, late=Target.close
    )


def build_target(request: Request, running: str, run: str, bounds: Images, machine: str = platform.machine()) -> Target:
    """Copy and unpack the given files, and compose the command line.

    Raises UsageError or Refused, and keeps nothing, if a file cannot be read or the command line is not valid.
    `running` is the command line that may be reused, `run` the mark for the next one.
    """
    assert request.kernel is not None, "a request with an image"
    target = Target(sealed.seal_file(request.kernel.fd, "image", request.kernel.name, bounds.max_size))
    try:
        try:
            target.apart = unpack_image(target.kernel, machine, bounds.max_unpacked)
            target.kernel = target.apart.kernel
        except KhoError as error:
            target.wrong["image"] = _without_frames(error)
        _compose_cmdline(target, request, running, run)
        _join_initrds(target, request.initrds, bounds)
    except BaseException:
        target.close()
        raise
    return target


def _without_frames(error: KhoError) -> KhoError:
    """Return an error without its traceback, whose frames would keep their mappings and the target itself in memory."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _compose_cmdline(target: Target, request: Request, running: str, run: str) -> None:
    """Set the command line: the given one, else the image's own (a UKI), else the running kernel's."""
    apart, given, where = target.apart, request.cmdline, cmdline.OPTIONS
    if given is None and not request.reuse and apart is not None:
        given, where = apart.cmdline, f"{target.kernel.name}: .cmdline"
    limit = apart.about.cmdline_limit if apart else COMMAND_LINE_SIZE - 1
    target.cmdline = cmdline.compose_cmdline(running, given, request.append, run, limit, request.remove, where)
    target.words = cmdline.compare_cmdlines(running, target.cmdline)


def _join_initrds(target: Target, given: tuple[Given, ...], bounds: Images) -> None:
    """Set the initrd: the image's own first, as in systemd-stub, then the given ones in order."""
    own = [target.apart.initrd] if target.apart and target.apart.initrd else []
    taken: list[Sealed] = []
    try:
        for one in given:
            taken.append(sealed.seal_file(one.fd, "initrd", one.name, bounds.max_size))
        parts = [*own, *taken]
        init = cmdline.init_path(target.booted_line)
        for part in parts:
            try:
                target.initrds.append(initrd.inspect_initrd(part, bounds.max_unpacked, init, last=part is parts[-1]))
            except KhoError as error:
                target.wrong.setdefault("initrd", _without_frames(error))
        if len(parts) == 1:
            target.initrd = parts[0]
            taken.clear()
        elif parts:
            target.initrd = sealed.join_initrds(parts, " + ".join(part.name for part in parts))
    finally:
        for part in taken:
            part.close()
