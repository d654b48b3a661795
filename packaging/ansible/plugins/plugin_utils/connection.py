# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The connection of an action that outlives the kernel it began in."""

from __future__ import annotations

from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.common.text.converters import to_native
from ansible.utils.display import Display

SSH_ARGS = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
"""A jump closes no connection: without keep-alives ssh would wait for the kernel that is gone. And nobody is there to
answer a question of ssh's."""
HOST_KEY = ("Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED")
REFUSED = (*HOST_KEY, "Permission denied", "Could not resolve hostname")
"""What ssh says where waiting does not help."""


def prepare_connection(connection):
    """Have ssh ask nothing, and notice that the host is gone."""
    if connection.transport == "ssh":
        given = connection.get_option("ssh_extra_args") or ""
        if SSH_ARGS not in given:
            connection.set_option("ssh_extra_args", ("%s %s" % (given, SSH_ARGS)).strip())
            reset_connection(connection)  # one that is shared was made without them


def reset_connection(connection):
    """Forget a connection that may lead into a kernel that is gone."""
    connection._shell.tmpdir = None  # it may be gone with the boot it was made in
    if connection.transport == "local":
        return
    try:
        connection.reset()
    except (AnsibleConnectionFailure, AttributeError) as error:
        Display().vvv("khod.kho: the connection could not be reset: %s" % to_native(error))
