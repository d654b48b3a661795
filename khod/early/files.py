# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a claim: taken out of its LUO session, and compared with what was read before the jump."""

import os
from functools import partial

from khod.kernel.pages import count_pages, digest_pages, read_page, read_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from khod.early.claims import EarlyClaim, EarlyFile, Kernel


class ArrivedOtherwise(Exception):
    """A file does not have the contents that it had before the jump: what that means is for khod to say."""


def take_files(kernel: "Kernel", session: int, claim: "EarlyClaim") -> None:
    """Take the descriptors of a claim's files out of its session, and compare the files.

    OSError if the kernel does not give one of them, ArrivedOtherwise if one has other contents. No descriptor stays
    open then, and khod can take the files out of the session again.
    """
    fds: list[int] = []
    try:
        for file in claim.files:
            fds.append(kernel.retrieve_fd(session, file.token))
            if not _is_unchanged(file, fds[-1]):
                raise ArrivedOtherwise(file.name)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    claim.fds = fds


def _is_unchanged(file: "EarlyFile", fd: int) -> bool:
    """Whether the pages that were read before the jump are the same now."""
    try:
        if read_size(fd) != file.size:
            return False
    except ValueError:
        return False
    digest, _ = digest_pages(partial(read_page, fd), file.pages or range(count_pages(file.size)))
    return digest == file.digest
