# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is reached from elsewhere: its own sshd, by a port of the loopback, through kexec and reset."""

import socket
from dataclasses import dataclass
from pathlib import Path

from tests.lab import forward
from tests.lab.conftest import Boot
from tests.lab.host import KHO, TRACE, Host

SSHD = 22
GATEWAY = "10.0.2.2"
ADDRESS_UNIT = """\
[Unit]
Before=network.target ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/python3 -c "import sys; sys.path.append('/usr/local/lib'); import forward; forward.set_address()"
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class RemoteHost(Host):
    """One guest with khod and sshd on it; `port` of 127.0.0.1 leads there."""

    port: int

    @property
    def known_host(self) -> str:
        """The line of a known_hosts file for it."""
        kind, key, *_ = self.guest.get("/etc/ssh/ssh_host_ed25519_key.pub").decode().split()
        return f"[127.0.0.1]:{self.port} {kind} {key}\n"


def free_port() -> int:
    """Give a port of the loopback that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
    return port


def boot_remote(boot: Boot, version: str, public_key: str) -> RemoteHost:
    """Boot a guest that lets root in with this key, and reaches this machine's loopback at GATEWAY."""
    port = free_port()
    network = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-{forward.ADDRESS}:{SSHD}"
    extra = ("-netdev", network, "-device", "virtio-net-pci,netdev=net")
    host = RemoteHost(boot(version, cmdline_extra=f"{KHO} {TRACE}", qemu_extra=extra), port)
    host.guest.wait_online()
    host.guest.put("/usr/local/lib/forward.py", Path(forward.__file__).read_bytes())
    host.guest.put("/etc/systemd/system/address.service", ADDRESS_UNIT)
    host.guest.put("/root/.ssh/authorized_keys", public_key, mode=0o600)
    host.shell("chmod 700 /root/.ssh; systemctl unmask -q ssh.service; systemctl daemon-reload")
    host.shell("systemctl enable -q --now address.service ssh.service; sync")
    return host
