# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khoctl calls ssh; what goes through a real sshd is in tests/lab/test_remote.py."""

import pytest

from khoctl.remote import ssh_command


@pytest.mark.parametrize("follows", [True, False])
def test_no_connection_outlives_a_kernel_that_did_not_close_it(follows: bool) -> None:
    """`kexec --now` closes none, and ssh, which has nothing to send, would wait for two hours."""
    command = ssh_command("web", ["kexec", "--now"], follows=follows)
    given = dict(word.split("=") for word in command[: command.index("--")] if "=" in word)
    assert 0 < int(given["ServerAliveInterval"]) * int(given["ServerAliveCountMax"]) <= 60
