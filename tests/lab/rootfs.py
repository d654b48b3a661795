# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guests' root file system is made of: Debian's packages, the agent, and a list of what is left out.

Under software emulation each process that starts costs a tenth of a second or more, so what no scenario looks at does
not start. What khod talks to stays as Debian ships it: systemd, the journal, udev, D-Bus, logind, tmpfiles, debugfs.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "kexec-tools",
    "openssh-server",
    "apparmor",
    "python3",
    "python3-typer",
    "python3-rich",
    "python3-pyudev",
    "python3-systemd",
    "python3-libfdt",
    "python3-asyncvarlink",
    "python3-jeepney",
    "python3-jsonschema",
    "python3-cramjam",
    "python3-zstandard",
    "python3-qemu-qmp",
    "python3-cryptography",
    "gpgv",
    "qemu-system-x86",
)
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
PROFILES = ("khod", "kho-sessions")  # of AppArmor; Debian's own are a hundred, which each boot would load
AGENT = "/usr/lib/khod-lab/agent.py"
JOURNAL = "/var/log/journal"
MACHINE_ID = "0123456789abcdef0123456789abcdef"  # fixed: an empty one would make each boot a first boot

MASKED_UNITS = (
    # nobody logs in or is asked for a password
    "getty.target",
    "serial-getty@.service",
    "systemd-user-sessions.service",
    "ssh.service",
    "ssh.socket",
    "systemd-ask-password-wall.path",
    "systemd-ask-password-console.path",
    "systemd-ask-password.socket",
    "systemd-mute-console.socket",
    # done when the image was made
    "ldconfig.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-sysusers.service",
    "systemd-journal-catalog-update.service",
    "systemd-machine-id-commit.service",
    "systemd-update-done.service",
    # the journal lives in /run and the random numbers come from the processor
    "systemd-journal-flush.service",
    "systemd-random-seed.service",
    "systemd-boot-random-seed.service",
    # devtmpfs makes every node there is, and these kernels have no modules, firmware, binfmt or crash store
    "kmod-static-nodes.service",
    "systemd-modules-load.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-pstore.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-udev-load-credentials.service",
    "modprobe@configfs.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "sys-kernel-config.mount",
    "sys-fs-fuse-connections.mount",
    "dev-mqueue.mount",
    "systemd-sysctl.service",
    "systemd-hibernate-clear.service",
    # sockets of services no scenario calls
    "systemd-creds.socket",
    "systemd-factory-reset.socket",
    "systemd-hostnamed.socket",
    "systemd-journalctl.socket",
    "systemd-sysext.socket",
    "systemd-sysinstall.socket",
    # timers would run while a scenario counts on quiet
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "systemd-tmpfiles-clean.timer",
)

AGENT_UNIT = f"""\
[Unit]
Description=Agent of the khod lab
# It starts with the first units and waits for none. It stays through a shutdown until systemd-shutdown kills it,
# so that whoever asked for the shutdown still gets an answer.
DefaultDependencies=no
IgnoreOnIsolate=yes
RefuseManualStop=yes

[Service]
ExecStart=/usr/bin/python3 -I -S {AGENT}
StandardError=journal+console
Restart=on-failure
# A command that a scenario left behind must not die with the agent.
KillMode=process

[Install]
WantedBy=sysinit.target
"""
COLDPLUG = """\
[Service]
# Hot-plugged devices raise events of their own; of those that were there from the start only these count.
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=virtio-ports
"""
# Debian's script looks at much before it does the same, which takes as long as a start of Python.
APPARMOR = """\
[Service]
ExecStart=
ExecStart=apparmor_parser --replace --write-cache /etc/apparmor.d
"""
FILES = {
    "/etc/hostname": "khod-lab\n",
    "/etc/machine-id": f"{MACHINE_ID}\n",
    "/usr/lib/systemd/system/khod-lab-agent.service": AGENT_UNIT,
    AGENT: (Path(__file__).parent / "agent.py").read_text(),
}
QUIET_FILES = {
    "/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
    "/etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStopSec=20s\n",
    "/etc/systemd/system/apparmor.service.d/lab.conf": APPARMOR,
    "/etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": COLDPLUG,
}
VENDOR_UNITS = "/usr/lib/systemd/system"
UNITS = "/etc/systemd/system"
LINKS = {
    f"{UNITS}/default.target": f"{VENDOR_UNITS}/multi-user.target",
    f"{UNITS}/sysinit.target.wants/khod-lab-agent.service": f"{VENDOR_UNITS}/khod-lab-agent.service",
}


def below(root: Path, path: str) -> Path:
    """Place of the guest's absolute `path` while its tree stands in `root`; the directories above it are made."""
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def settle(root: Path, *, as_installed: bool = False) -> None:
    """Turn the Debian tree in `root` into a guest's: agent in, /etc and /var up to date, what wastes time out.

    With `as_installed` nothing is taken out, and the journal is on the disk.
    """
    for path, text in FILES.items():
        below(root, path).write_text(text)
    for path, target in LINKS.items():
        _link(root, path, target)
    if as_installed:
        below(root, JOURNAL).mkdir(exist_ok=True)
    else:
        _quieten(root)
    for stamp in ("etc/.updated", "var/.updated"):  # newer than /usr, or systemd rebuilds its caches in each boot
        (root / stamp).touch()
        os.utime(root / stamp, (2**32 - 1, 2**32 - 1))


def _quieten(root: Path) -> None:
    """Take out what no scenario looks at."""
    for path, text in QUIET_FILES.items():
        below(root, path).write_text(text)
    for unit in MASKED_UNITS:
        _link(root, f"{UNITS}/{unit}", "/dev/null")
    for generator in (root / "usr/lib/systemd/system-generators").iterdir():
        _link(root, f"/etc/systemd/system-generators/{generator.name}", "/dev/null")
    for profile in (root / "etc/apparmor.d").iterdir():
        if profile.is_file() and profile.name not in PROFILES:
            profile.unlink()


def _link(root: Path, path: str, target: str) -> None:
    link = below(root, path)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
