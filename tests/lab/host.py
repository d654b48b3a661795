"""A guest as its operator knows it: khoctl, the kernel's own word, and nothing else."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.errors import Result
from tests.lab.guest import Guest

IMAGES = "/lab/kernels"
INITRD = "/lab/initrd.img"
MODULE = "/lab/kho_v3.ko"
KHO = "kho=on liveupdate=on"
TRACE = "reserve_mem=12M:4096:trace trace_instance=boot_map@trace"
MARKER = "khod-test.second=1"
INSTANCE = "/sys/kernel/tracing/instances/boot_map"


@dataclass(frozen=True)
class Host:
    """One guest with khod on it."""

    guest: Guest

    def khoctl(self, *words: str, code: int = 0) -> Result:
        """Run khoctl and hold its exit code."""
        result = self.guest.run(["khoctl", *words], check=False)
        said = f"khoctl {' '.join(words)} exited with {result.rc}\n{result.stdout}{result.stderr}"
        assert result.rc == code, said
        assert "Traceback" not in result.stderr, said
        return result

    def status(self, code: int = 0) -> dict[str, Any]:
        """Give khoctl status as JSON."""
        found: dict[str, Any] = json.loads(self.khoctl("status", "--json", code=code).stdout)
        return found

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

    def sha256(self, path: str) -> str:
        """Hash a file of the guest."""
        return hashlib.sha256(self.guest.get(path)).hexdigest()

    def with_module(self) -> "Host":
        """Give this kernel the v3 interface, now and at every boot, and khod a fresh look at it."""
        self.shell(
            f"d=/usr/lib/modules/$(uname -r); mkdir -p $d; cp {MODULE} $d/; depmod 2>/dev/null;"
            "echo kho_v3 > /etc/modules-load.d/kho_v3.conf; systemctl unmask -q systemd-modules-load.service;"
            "modprobe kho_v3; sync; systemctl restart kho-handover"
        )
        return self

    def kexec(self, version: str, *words: str) -> None:
        """Hand over to a kernel of the lab with `khoctl kexec`, and wait for it."""
        before = self.guest.boot_id
        self.khoctl("kexec", *image(version), "--append", MARKER, *words)
        hello = self.guest.wait_reboot(before)
        assert hello.how == "kexec"
        assert MARKER in hello.cmdline.split()
        assert hello.boot_id != before

    def dmesg(self) -> str:
        """Give the running kernel's log."""
        return self.guest.run(["dmesg"]).stdout


def image(version: str) -> Sequence[str]:
    """Name a kernel of the lab and its initrd to khoctl."""
    return "--image", f"{IMAGES}/{version}/bzImage", "--initrd", INITRD
