# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel: the request for it, and what khod made of that in memory."""

import os
import platform
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import field

from khod.concurrency.worker import Worker
from khod.config import Images
from khod.dataclass import dataclass
from khod.errors import KhoError, Refused
from khod.history.model import FileOrigin
from khod.images import initrd, sealed
from khod.images.initrd import Initrd
from khod.images.kernel import UnpackedImage, unpack_image
from khod.images.sealed import Sealed
from khod.kernel import cmdline, kconfig
from khod.model import NO_TERMS, Terms, Word
from khod.provenance.verify import TakenFile

COMMAND_LINE_SIZE = 2048
"""The limit in bytes, with the NUL, if the image could not be examined; most architectures have this one."""
MAX_SIGNATURE_BYTES = 1 << 20
"""The maximum size of a detached signature; a usual one has a few hundred bytes."""


@dataclass(frozen=True)
class Given:
    """A file that was passed in: its descriptor stays the caller's, its name is for people.

    `signatures` are detached signatures of it. With `must_be_signed` one of them must be good, whatever policy says.
    """

    fd: int
    name: str
    signatures: tuple["Given", ...] = ()
    must_be_signed: bool = False


@dataclass(frozen=True)
class Request:
    """A request of `khoctl kexec`; `cmdline` is None if not given, `reuse` requires the running kernel's."""

    kernel: Given | None = None
    initrds: tuple[Given, ...] = ()
    cmdline: str | None = None
    reuse: bool = False
    append: str | None = None
    remove: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    """Digests that the files must have; none for any."""
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
    reports it: an operator may have set that check to warn. `origins` is what is known of the files as they were given,
    and with `is_refused` policy is against one of them: then nothing of them was unpacked.
    """

    kernel: Sealed
    apart: UnpackedImage | None = None
    initrd: Sealed | None = None
    initrds: list[Initrd] = field(default_factory=list)
    cmdline: str = ""
    words: list[Word] = field(default_factory=list)
    wrong: dict[str, KhoError] = field(default_factory=dict)
    origins: list[FileOrigin] = field(default_factory=list)
    is_refused: bool = False

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


Verify = Callable[[Worker, Sequence[TakenFile], Images, Sequence[str]], Awaitable[list[FileOrigin]]]
"""Returns what is known of who made each file: `khod.provenance.verify.verify_files`."""


async def take_target(
    worker: Worker, request: Request, running: str, run: str, policy: Images, verify: Verify, *, enforce: bool
) -> Target:
    """Build the target in a worker, long before any producer is frozen, because it is slow. It may be cancelled.

    The files are verified first. With `enforce` those that policy is against are not unpacked.
    """
    files = await worker.call_within(
        lambda: seal_request(request, policy), "reading the image", None, late=_close_files
    )
    try:
        origins = await verify(worker, files, policy, request.sha256)
    except BaseException:
        _close_files(files)
        raise
    for one in files:
        one.close_signatures()
    is_refused = enforce and any(origin.refusal for origin in origins)
    target = await worker.call_within(
        lambda: build_target(files, request, running, run, policy, is_refused=is_refused),
        "unpacking the image",
        None,
        late=Target.close,
    )
    target.origins = origins
    return target


def seal_request(request: Request, bounds: Images) -> list[TakenFile]:
    """Copy the given files into sealed memory, the kernel first.

    Raises UsageError or Refused, and keeps nothing, if one of them cannot be read; for a signature that is in the file
    that it belongs to.
    """
    assert request.kernel is not None, "a request with an image"
    files: list[TakenFile] = []
    try:
        for role, given in [("image", request.kernel), *(("initrd", one) for one in request.initrds)]:
            file = sealed.seal_file(given.fd, role, given.name, bounds.max_size)
            files.append(_take_signatures("kernel" if role == "image" else role, file, given))
    except BaseException:
        _close_files(files)
        raise
    return files


def _take_signatures(role: str, file: Sealed, given: Given) -> TakenFile:
    taken: list[Sealed] = []
    unusable: list[Refused] = []
    for signature in given.signatures:
        try:
            if os.fstat(signature.fd).st_size > MAX_SIGNATURE_BYTES:
                raise Refused(f"{signature.name} has more than {MAX_SIGNATURE_BYTES} bytes, which no signature has")
            taken.append(sealed.seal_file(signature.fd, "signature", signature.name, MAX_SIGNATURE_BYTES))
        except KhoError as error:
            unusable.append(Refused(f"{error.what} ({signature.name})", remedy="Get the signature again."))
    return TakenFile(role, file, tuple(taken), tuple(unusable), given.must_be_signed)


def _close_files(files: Sequence[TakenFile]) -> None:
    for one in files:
        one.file.close()
        one.close_signatures()


def build_target(
    files: Sequence[TakenFile],
    request: Request,
    running: str,
    run: str,
    bounds: Images,
    machine: str = platform.machine(),
    *,
    is_refused: bool = False,
) -> Target:
    """Unpack the files, which are the target's from here on, and compose the command line.

    Raises UsageError or Refused, and closes the files, if the command line is not valid. `running` is the command line
    that may be reused, `run` the mark for the next one. With `is_refused` the files stay as they are.
    """
    kernel, *parts = [one.file for one in files]
    target = Target(kernel, is_refused=is_refused)
    try:
        if not is_refused:
            try:
                target.apart = unpack_image(kernel, machine, bounds.max_unpacked)
                target.kernel = target.apart.kernel
            except KhoError as error:
                target.wrong["image"] = _without_frames(error)
        _compose_cmdline(target, request, running, run)
        _join_initrds(target, parts, bounds)
    except BaseException:
        target.close()
        for part in parts:
            part.close()
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


def _join_initrds(target: Target, given: list[Sealed], bounds: Images) -> None:
    """Set the initrd: the image's own first, as in systemd-stub, then the given ones in order.

    Those that are closed here, or become the target's, are taken out of `given`.
    """
    own = [target.apart.initrd] if target.apart and target.apart.initrd else []
    parts = [*own, *given]
    if not target.is_refused:
        _inspect_initrds(target, parts, bounds)
    if len(parts) == 1:
        target.initrd = parts[0]
    elif parts:
        target.initrd = sealed.join_initrds(parts, " + ".join(part.name for part in parts))
        for part in given:
            part.close()
    given.clear()


def _inspect_initrds(target: Target, parts: list[Sealed], bounds: Images) -> None:
    init = cmdline.init_path(target.booted_line)
    for part in parts:
        try:
            target.initrds.append(initrd.inspect_initrd(part, bounds.max_unpacked, init, last=part is parts[-1]))
        except KhoError as error:
            target.wrong.setdefault("initrd", _without_frames(error))
