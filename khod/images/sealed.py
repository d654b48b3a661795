"""Files taken into a sealed memfd, before the blackout: what was checked is what gets loaded."""

import fcntl
import hashlib
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from khod.errors import Refused, errno_text
from khod.files import check_regular

CHUNK = 1 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Sealed:
    """A file's contents, read-only for good: `fd` belongs to this object, `size` is in bytes."""

    fd: int
    size: int
    sha256: str
    name: str

    def head(self, length: int) -> bytes:
        """The first `length` bytes, fewer where there are no more."""
        return os.pread(self.fd, length, 0)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def seal(fd: int, role: str, name: str, limit: int) -> Sealed:
    """Copy a regular file into a sealed memfd; UsageError or Refused where it cannot serve as `role`.

    `limit` in bytes bounds what a client can make khod hold. The given fd stays the caller's.
    """
    check_regular(fd, role, name)
    size = os.fstat(fd).st_size
    if size == 0:
        raise Refused(f"The {role} is empty", where=name, remedy="Copy it again; the kernel loads no empty file.")
    if size > limit:
        raise Refused(
            f"The {role} is {size} bytes, more than the {limit} allowed",
            where=name,
            remedy="Raise `images.max_size` in /etc/kho/khod.toml if this is meant.",
        )
    memfd = os.memfd_create(f"khod-{role}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        digest, copied = hashlib.sha256(), 0
        while chunk := os.pread(fd, CHUNK, copied):
            if copied + len(chunk) > limit:
                raise Refused(f"The {role} grows while it is read", where=name, remedy="Wait for its writer.")
            digest.update(chunk)
            os.pwrite(memfd, chunk, copied)
            copied += len(chunk)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(memfd)
        raise Refused(
            f"The {role} cannot be read: {errno_text(error)}",
            where=name,
            remedy="Check the file and the disk it lies on.",
        ) from error
    except Refused:
        os.close(memfd)
        raise
    return Sealed(memfd, copied, digest.hexdigest(), name)
