#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes khod's socket out of a guest, as ssh -L would: one end runs in the guest, the other beside the test.

Needs nothing but the standard library. In the guest (`forward.py PORT`) it takes connections by TCP to khod's socket,
beside the test it takes those of a socket to the guest. Neither ends a connection that the other end has left open.
"""

import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # include/uapi/linux/sockios.h
IFF_UP = 1
ADDRESS = "10.0.2.15"  # the guest's, in the network that QEMU's `-netdev user` makes
KHOD = "/run/khod/io.kho.Handover"


def forward(listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Take each connection of `listener` to one that `connect` makes, in both directions; return when it is closed."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, connect), daemon=True).start()


def _serve(client: socket.socket, connect: Callable[[], socket.socket]) -> None:
    with client, suppress(OSError), connect() as other:
        back = threading.Thread(target=_pump, args=(other, client), daemon=True)
        back.start()
        _pump(client, other)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends; then the sink is told, and whoever reads from it."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def set_address() -> None:
    """Give the guest's only network interface its address."""
    (name,) = (name for name in os.listdir("/sys/class/net") if name != "lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for call, address in ((SIOCSIFADDR, ADDRESS), (SIOCSIFNETMASK, "255.255.255.0")):
            fields = name.encode(), socket.AF_INET, 0, socket.inet_aton(address)
            fcntl.ioctl(control, call, struct.pack("16sHH4s8x", *fields))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), IFF_UP))


def connect_khod() -> socket.socket:
    """Connect to khod in this guest."""
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(KHOD)
    except OSError:
        made.close()
        raise
    return made


if __name__ == "__main__":
    set_address()
    with socket.create_server((ADDRESS, int(sys.argv[1]))) as listening:
        forward(listening, connect_khod)
