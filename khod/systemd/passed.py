# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors that the service manager passes at the start, and kept: sd_listen_fds(3)."""

import os

import systemd.daemon


def listen_fds_by_name() -> dict[str, int]:
    """Return the descriptors that the service manager passed at the start, by name; they are now close-on-exec."""
    found: dict[int, str] = systemd.daemon.listen_fds_with_names()
    for fd in found:
        os.set_inheritable(fd, False)
    return {name: fd for fd, name in found.items()}
