"""The next kernel: what was asked for, and what was made of it in memory."""

from dataclasses import dataclass

from khod import cmdline
from khod.errors import KhoError
from khod.images import recognise, sealed
from khod.images.sealed import Sealed


@dataclass(frozen=True)
class Request:
    """What `khoctl kexec` asks for. File descriptors stay the caller's; None is not given."""

    kernel_fd: int | None = None
    kernel_name: str = ""
    initrd_fd: int | None = None
    initrd_name: str = ""
    cmdline: str | None = None
    append: str | None = None
    now: bool = False
    load_only: bool = False
    hold: bool = False


@dataclass(frozen=True)
class Target:
    """The next kernel, in memory and checked: owned by the attempt that loads it."""

    kernel: Sealed
    initrd: Sealed | None
    cmdline: str

    def close(self) -> None:
        """Give both images' memory back."""
        self.kernel.close()
        if self.initrd is not None:
            self.initrd.close()


def take(request: Request, kernel_fd: int, running: str, run: str, limit: int) -> Target:
    """Seal both images and compose the command line; raises Refused or UsageError, nothing is kept then.

    `running` is the command line that may be reused, `run` what marks the next one, `limit` bounds each
    image in bytes.
    """
    kernel = sealed.seal(kernel_fd, "image", request.kernel_name, limit)
    initrd = None
    try:
        if request.initrd_fd is not None:
            initrd = sealed.seal(request.initrd_fd, "initrd", request.initrd_name, limit)
            recognise.initrd(initrd)
        longest = recognise.kernel(kernel).cmdline_limit
        return Target(kernel, initrd, cmdline.compose(running, request.cmdline, request.append, run, longest))
    except KhoError:
        kernel.close()
        if initrd is not None:
            initrd.close()
        raise
