# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running kernel, for the early restore; `khod.abi.calls.HostCalls` is the whole of it."""

import os

from khod.abi import liveupdate


class HostKernel:
    """What the early restore asks of the running kernel; every method raises OSError. Its files are below `root`."""

    def __init__(self, root: str = "") -> None:
        self._root = root

    def read_file(self, path: str) -> bytes:
        """Read to end of file."""
        with open(f"{self._root}{path}", "rb", buffering=0) as file:
            return file.readall()

    def retrieve_session(self, name: str) -> int:
        """Return the descriptor of a session that the previous kernel handed over."""
        device = liveupdate.open_device(f"{self._root}{liveupdate.LIVEUPDATE}")
        try:
            return liveupdate.retrieve_session(device, name)
        finally:
            os.close(device)

    def retrieve_fd(self, session: int, token: int) -> int:
        """Return a descriptor for a file of a retrieved session."""
        return liveupdate.retrieve_fd(session, token)
