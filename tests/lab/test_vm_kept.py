# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU in libvirt's style (memory-backend-memfd), started by a unit: its guest lives through the host's kexec."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lab.conftest import Online
from tests.lab.counter import write_image
from tests.lab.host import Host
from tests.lab.test_vm import DIRECTORY, QEMU, VERSION, counts_on

NAME, SOCKET = "others", "/run/others.qmp"
START = f"""\
#!/bin/sh
ram=memory-backend-memfd,id=pc.ram,size=64M,share=on
[ -z "$LISTEN_FDS" ] || ram=memory-backend-file,id=pc.ram,size=64M,mem-path=/proc/self/fd/3,share=on
exec {{command}} -object $ram -machine memory-backend=pc.ram -qmp unix:{SOCKET},server=on,wait=off \\
    ${{{{LISTEN_FDS:+-incoming defer}}}}
"""
UNIT = f"""\
[Unit]
Wants=khod-vm@{NAME}.service
After=khod-vm@{NAME}.service

[Service]
ExecStart={DIRECTORY}/start

[Install]
WantedBy=multi-user.target
"""


def test_its_unit_is_given_the_guest_again(online: Online, tmp_path: Path) -> None:
    host = Host(online(VERSION))
    host.guest.wait_online()
    host.guest.put(f"{DIRECTORY}/counter", write_image(tmp_path / "counter").read_bytes())
    serial = ["-chardev", f"file,id=serial,path={DIRECTORY}/{NAME},append=on", "-serial", "chardev:serial"]
    words = " ".join([*QEMU, "-m", "64M", "-bios", f"{DIRECTORY}/counter", *serial])
    host.guest.put(f"{DIRECTORY}/start", START.format(command=words))
    host.guest.put(f"/etc/systemd/system/{NAME}.service", UNIT)
    host.guest.put(
        f"/etc/kho/producers.d/{NAME}.toml",
        f'qmp = "{SOCKET}"\nkeep = true\nrestart = "{NAME}.service"\ntimeout = 120\n',
    )
    host.shell(f"chmod +x {DIRECTORY}/start; systemctl daemon-reload; systemctl enable -q --now {NAME}; sync")
    host.shell(f"systemctl stop khod-vm@{NAME}")  # khod starts it again
    counts_on(host, NAME)

    host.kexec(VERSION)

    counts_on(host, NAME)
    verdict = json.loads(host.khoctl("verify", "--json").stdout)["verdict"]
    assert NAME in verdict["arrived"]
    assert host.shell(f"systemctl is-active {NAME}").strip() == "active"
    assert host.shell(f"ls /run/systemd/system/{NAME}.service.d 2>/dev/null || true").strip() == ""
