# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest as its operator knows it: khoctl, the kernel's own word, and nothing else."""

import hashlib
import io
import json
import shlex
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import khod
from khod.kernel.protocol import pair_regions
from khod.region import Region
from tests.lab.errors import GuestRebooted, Result
from tests.lab.guest import Guest

IMAGES = "/lab/kernels"
INITRD = "/lab/initrd.img"
MODULE = "/lab/kho_v3.ko"
KHO = "kho=on liveupdate=on"
LUO_OFF = "kho=on"
TRACE = "reserve_mem=12M:4096:trace trace_instance=boot_map@trace"
HOTPLUG = ("-device", "pcie-root-port,id=hot,chassis=1,slot=1")
OUT = "/sys/kernel/debug/kho/out"
MARKER = "khod-test.second=1"
INSTANCE = "/sys/kernel/tracing/instances/boot_map"
DROP_INS = "/etc/systemd/system/kho-handover.service.d"
LINE = "written-before-the-jump"

# An archive of a given size, to the byte: one member of zeros, which take no room on the disk.
ARCHIVE = """\
import sys

def member(name, size):
    fields = (1, 0o100644, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name + bytes(1)
    return head + bytes(-len(head) % 4)

total, end = int(sys.argv[2]), member(b"TRAILER!!!", 0)
zeros = total - len(end) - len(member(b"zeros", 0))
with open(sys.argv[1], "wb") as file:
    file.write(member(b"zeros", zeros))
    file.seek(zeros, 1)
    file.write(end)
"""

# One reload of systemd takes ten seconds, in which PID 1 does nothing else. SIGSTOP does not reach it, and its control
# group's freezer does not either.
SLOW_GENERATOR = """\
#!/usr/bin/python3
import os, time
if os.path.exists("/run/busy"):
    os.unlink("/run/busy")
    time.sleep(10)
"""

PRODUCER_UNIT = """\
[Unit]
Wants=kho-handover.socket
After=kho-handover.service
[Service]
Type=notify
ExecStart=/usr/bin/python3 {path} {words}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Host:
    """One guest with khod on it."""

    guest: Guest

    def khoctl(self, *words: str, code: int = 0) -> Result:
        """Run khoctl and hold its exit code; a kexec that jumps gives none, and counts as 0."""
        try:
            result = self.guest.run(["khoctl", *words], check=False)
        except GuestRebooted:
            assert (words[0], code) == ("kexec", 0), words
            return Result(0, "", "")
        said = f"khoctl {' '.join(words)} exited with {result.rc}\n{result.stdout}{result.stderr}"
        assert result.rc == code, said
        assert "Traceback" not in result.stderr, said
        return result

    def checks(self, *words: str, code: int = 0) -> dict[str, dict[str, str]]:
        """Give what `khoctl check` finds, by the check's name."""
        found = json.loads(self.khoctl("check", *words, "--json", code=code).stdout)
        return {check["name"]: check for check in found}

    def configure(self, name: str, text: str) -> None:
        """Write a fragment of khod's configuration and have khod read it."""
        self.guest.put(f"/etc/kho/khod.toml.d/{name}.toml", text)
        self.guest.run(["systemctl", "reload", "kho-handover"])

    def leave_stop_to_systemd(self) -> None:
        """Have an orderly jump stop the host after the freeze, by `systemctl kexec`."""
        self.configure("quiesce", "[quiesce]\nenabled = false\n")

    def status(self, code: int = 0) -> dict[str, Any]:
        """Give khoctl status as JSON."""
        found: dict[str, Any] = json.loads(self.khoctl("status", "--json", code=code).stdout)
        return found

    def settled(self, code: int = 0) -> dict[str, Any]:
        """Wait until a khod that was just started has rolled back, or has taken stock; status answers before."""
        # Without `boot_id` it is the record's state, which khod tells until it has looked at the kernel.
        busy = 'khoctl status --json | grep -qE \'"phase": "(rolling_back|verifying)"|"boot_id": ""\''
        self.shell(f"timeout 60 sh -c {shlex.quote(f'while {busy}; do sleep 0.2; done')}")
        return self.status(code)

    def shell(self, script: str, *, check: bool = True) -> str:
        """Run a shell script, give its standard output."""
        return self.guest.run(["sh", "-ec", script], check=check).stdout

    def word(self, path: str) -> str:
        """Read a kernel attribute."""
        return self.guest.get(path).decode().strip()

    def untouched(self) -> None:
        """Hold that the v3 kernel is inactive with nothing loaded, by the kernel's own word."""
        assert self.word("/sys/kernel/kho/active") == "0"
        assert self.word("/sys/kernel/kexec_loaded") == "0"

    def hook_leftovers(self) -> tuple[str, str]:
        """Give the units and the control groups of hooks that are there: "" where nothing is left."""
        units = self.shell("systemctl list-units --all --plain --no-legend 'kho-hook-*'").strip()
        return units, self.shell("ls -d /sys/fs/cgroup/system.slice/kho-hook-* 2>/dev/null || true").strip()

    def occupy_systemd(self) -> None:
        """Have systemd reload for ten seconds, in which PID 1 does nothing else; return when that has begun."""
        self.guest.put("/run/systemd/system-generators/slow", SLOW_GENERATOR, mode=0o755)
        self.shell(
            "touch /run/busy; systemctl daemon-reload --no-block;"
            "timeout 30 sh -c 'while [ -e /run/busy ]; do sleep 0.1; done'"
        )

    def put_sources(self, folder: str) -> None:
        """Put khod's sources into a folder of the guest."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(Path(khod.__file__).parent, "khod", filter=lambda one: None if "__pycache__" in one.name else one)
        self.guest.put(f"{folder}/khod.tar", packed.getvalue())
        self.shell(f"tar -C {folder} -xf {folder}/khod.tar")

    def sha256(self, path: str) -> str:
        """Hash a file of the guest."""
        return hashlib.sha256(self.guest.get(path)).hexdigest()

    def scratch(self) -> list[Region]:
        """Give the kernel's scratch regions, in its order, by whichever name it has for them."""
        name = self.shell(f"cd {OUT}; ls -d bootmem_phys scratch_phys 2>/dev/null || true").split("_")[0]
        return pair_regions(self.guest.get(f"{OUT}/{name}_phys"), self.guest.get(f"{OUT}/{name}_len"))

    def archive(self, path: str, size: int) -> None:
        """Leave an initrd of so many bytes in the guest: zeros, which take no room there."""
        self.guest.run(["python3", "-c", ARCHIVE, path, str(size)])

    def with_module(self) -> "Host":
        """Give this kernel the v3 interface, now and at every boot, and khod a fresh look at it."""
        self.guest.put(f"{DROP_INS}/module.conf", "[Unit]\nAfter=systemd-modules-load.service\n")
        self.shell(
            f"d=/usr/lib/modules/$(uname -r); mkdir -p $d; cp {MODULE} $d/; depmod 2>/dev/null;"
            "echo kho_v3 > /etc/modules-load.d/kho_v3.conf; systemctl unmask -q systemd-modules-load.service;"
            "modprobe kho_v3; systemctl daemon-reload; sync; systemctl restart kho-handover"
        )
        return self

    def install_producer(self, name: str, *words: str) -> None:
        """Put NAME.py of the lab into the guest, as a service that starts at every boot, with these arguments."""
        path = f"/usr/lib/{name}/{name}.py"
        self.guest.put(path, Path(__file__).with_name(f"{name}.py").read_bytes())
        self.guest.put(f"/etc/systemd/system/{name}.service", PRODUCER_UNIT.format(path=path, words=" ".join(words)))
        self.shell(f"systemctl daemon-reload; systemctl enable -q {name}; sync")

    def kexec(self, version: str, *words: str) -> None:
        """Hand over to a kernel of the lab with `khoctl kexec`, and wait for it."""
        before = self.guest.boot_id
        self.khoctl("kexec", *image(version), "--append", MARKER, *words)
        hello = self.guest.wait_reboot(before)
        assert hello.how == "kexec"
        assert MARKER in hello.cmdline.split()
        assert hello.boot_id != before

    def write_line(self) -> None:
        """Leave a line in the preserved trace instance, as the mission's example does."""
        self.shell(f"echo 1 > {INSTANCE}/tracing_on; echo {LINE} > {INSTANCE}/trace_marker")

    def has_line(self) -> bool:
        """Tell whether that line stands in the instance of this kernel."""
        return LINE in self.shell(f"cat {INSTANCE}/trace")

    def dmesg(self) -> str:
        """Give the running kernel's log."""
        return self.guest.run(["dmesg"]).stdout


def image(version: str) -> Sequence[str]:
    """Name a kernel of the lab and its initrd to khoctl."""
    return "--image", f"{IMAGES}/{version}/bzImage", "--initrd", INITRD
