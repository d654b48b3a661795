# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The connection of an action that outlives the kernel it began in."""

from __future__ import annotations

import time

from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.common.text.converters import to_native
from ansible.utils.display import Display

SSH_ARGS = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
"""A jump closes no connection: without keep-alives ssh would wait for the kernel that is gone. And nobody is there to
answer a question of ssh's."""
HOST_KEY = ("Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED")
REFUSED = (*HOST_KEY, "Permission denied", "Could not resolve hostname")
"""What ssh says where waiting does not help."""
PAUSE_SECONDS = 2.0


def prepare_connection(connection):
    """Have ssh ask nothing, and notice that the host is gone."""
    if connection.transport == "ssh":
        given = connection.get_option("ssh_extra_args") or ""
        if SSH_ARGS not in given:
            connection.set_option("ssh_extra_args", ("%s %s" % (given, SSH_ARGS)).strip())
            reset_connection(connection)  # one that is shared was made without them


def keep_asking(ask, connection, seconds):
    """Return what `ask()` returns; ask again where the connection is lost, unless ssh is refused for good.

    A host that is reached one moment may be in its jump the next. After `seconds` AnsibleConnectionFailure is raised.
    """
    ends = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except AnsibleConnectionFailure as error:
            if any(text in to_native(error) for text in REFUSED) or time.monotonic() >= ends:
                raise
        reset_connection(connection)
        time.sleep(PAUSE_SECONDS)


def execute_module(action, name, arguments, task_vars):
    """Run a module of this collection on the host; AnsibleConnectionFailure where it is not reached."""
    found = action._execute_module(module_name="khod.kho.%s" % name, module_args=arguments, task_vars=task_vars)
    if found.get("unreachable"):
        raise AnsibleConnectionFailure(found.get("msg", "unreachable"))
    return found


def reset_connection(connection):
    """Forget a connection that may lead into a kernel that is gone."""
    connection._shell.tmpdir = None  # it may be gone with the boot it was made in
    if connection.transport == "local":
        return
    try:
        connection.reset()
    except (AnsibleConnectionFailure, AttributeError) as error:
        Display().vvv("khod.kho: the connection could not be reset: %s" % to_native(error))
