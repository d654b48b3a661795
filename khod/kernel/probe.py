# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find out which KHO this kernel has, by what it shows: never by its version.

Distributions turn options off, Kconfig help texts are wrong, and vendors ship v3 with other version numbers.
"""

from typing import TYPE_CHECKING

from khod.abi.calls import Calls
from khod.dataclass import dataclass
from khod.deferred import defer_module
from khod.kernel import debugfs, sysfs
from khod.kernel.debugfs import Finalize, FinalizeNoAbort, Stateless
from khod.kernel.errnos import SCRATCH_PARAMETERS
from khod.kernel.protocol import KhoKernel
from khod.kernel.sysfs import SysfsKho

if TYPE_CHECKING:
    from khod.kernel import kconfig
else:
    kconfig = defer_module("khod.kernel.kconfig")


@dataclass(frozen=True)
class Probed:
    """The kernel's generation, or why it has none and what to add."""

    kernel: KhoKernel | None
    what: str
    remedy: str


def probe_kho(calls: Calls) -> Probed:
    """Choose the generation; raises nothing, because a file that cannot be read is evidence too."""
    try:
        return _probe_generation(calls)
    except OSError as error:
        return Probed(
            None,
            f"It cannot be told whether this kernel has Kexec HandOver: {error}",
            "Run khod as root, without lockdown.",
        )


def _probe_generation(calls: Calls) -> Probed:
    if calls.path_exists(f"{sysfs.KHO}/active"):
        return _require_on(SysfsKho(calls), "KHO v3 through /sys/kernel/kho", "kho_scratch=512M")
    if calls.path_exists(f"{debugfs.KHO}/out/finalize"):
        if _may_abort(calls):
            return _require_on(Finalize(calls), "KHO through debugfs `finalize`, which can be undone", "kho=on")
        return _require_on(FinalizeNoAbort(calls), "KHO through debugfs `finalize`, for good", "kho=on")
    if calls.path_exists(f"{debugfs.KHO}/out"):
        return _require_on(Stateless(calls), "Stateless KHO (nothing to finalize)", "kho=on")
    return Probed(None, *_why_not(calls))


def _may_abort(calls: Calls) -> bool:
    """Whether `finalize` can be undone: tell 6.16-6.18 from 6.19-7.0.

    If nothing is finalized, `out/fdt` decides: on 6.19 it exists from boot on, before that only after finalize.
    Otherwise /sys/kernel/kexec/ decides, which came with 6.19: `finalize` may already read 1 (set by hand, or by a khod
    that died), and a kernel reached by a handover may show no `out/fdt` (see Stateless).
    """
    finalized = calls.read_file(f"{debugfs.KHO}/out/finalize").strip() not in (b"0", b"N")
    if not finalized and calls.path_exists(f"{debugfs.KHO}/out/fdt"):
        return False
    return not calls.path_exists("/sys/kernel/kexec/loaded")


def _require_on(kernel: KhoKernel, what: str, parameter: str) -> Probed:
    try:
        scratch = kernel.scratch_regions()
    except (OSError, ValueError) as error:
        return Probed(
            None,
            f"{what}, but its scratch regions cannot be read: {error}",
            "Run khod as root, without lockdown.",
        )
    if not scratch:
        return Probed(
            None,
            f"{what}, but no scratch memory was reserved at boot",
            f"Boot with {parameter} on the kernel command line.",
        )
    return Probed(kernel, what, "")


def _why_not(calls: Calls) -> tuple[str, str]:
    if kconfig.built_in(calls, "CONFIG_KEXEC_HANDOVER", "kho_") is False:
        return (
            "This kernel was built without Kexec HandOver (CONFIG_KEXEC_HANDOVER is not set)",
            "Boot a kernel built with CONFIG_KEXEC_HANDOVER=y and CONFIG_KEXEC_HANDOVER_DEBUGFS=y.",
        )
    if not kconfig.kho_on(calls):
        return (
            "Kexec HandOver is compiled in and switched off: kho=on is not on the kernel command line",
            f"Add kho=on to the kernel command line (and {SCRATCH_PARAMETERS} for its scratch memory) and boot again.",
        )
    if b" debugfs " not in calls.read_file("/proc/mounts"):
        return (
            "debugfs is not mounted, and this kernel shows KHO nowhere else",
            "Run: mount -t debugfs debugfs /sys/kernel/debug",
        )
    return (
        "KHO is switched on, and the kernel shows none in debugfs",
        "Look for `KHO:` in the kernel log: the scratch reservation may have failed, or "
        "CONFIG_KEXEC_HANDOVER_DEBUGFS is not set, or lockdown hides debugfs.",
    )
