# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the running kernel: whether it can hand over, and whether khod is allowed to."""

import platform

from khod.handover.reconcile import describe_kernel
from khod.kernel import host
from khod.kernel.kconfig import is_configured
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.kernel.next_arg import kernel_args
from khod.kernel.sysfs import KHO
from khod.kernel.traits import traits_of
from khod.model import CheckResult
from khod.preflight.facts import CheckFinding, Facts, format_regions
from khod.text import join_names

LOCKED = ("integrity", "confidentiality")
UNDOABLE_LOAD = 2  # calls: one to load, one to unload


def check_kho(facts: Facts) -> CheckFinding:
    """The kernel has KHO, and it is on; the evidence names the generation."""
    result = CheckResult.unsupported if facts.probed.kernel is None else CheckResult.passed
    return CheckFinding(result, facts.probed.what, facts.probed.remedy)


def check_scratch(facts: Facts) -> CheckFinding | None:
    """Memory is reserved for the next kernel to start in."""
    if facts.probed.kernel is None:
        return None
    regions = facts.probed.kernel.scratch_regions()
    total = sum(region.size for region in regions) >> 20
    return CheckFinding.pass_with(
        f"{total} MiB in {len(regions)} {'region' if len(regions) == 1 else 'regions'}: {format_regions(regions)}"
    )


def check_capability(facts: Facts) -> CheckFinding:
    """The process has the capability to load an image and to jump."""
    allowed = host.may_boot(facts.kexec.calls)
    if allowed is None:
        return CheckFinding.skip_with("Capabilities unknown: /proc/self/status does not tell them")
    if not allowed:
        return CheckFinding.fail_with(
            "khod lacks CAP_SYS_BOOT: it can neither load an image nor jump", "Run khod from its unit."
        )
    return CheckFinding.pass_with("khod has CAP_SYS_BOOT")


def check_namespaces(facts: Facts) -> CheckFinding | None:
    """The daemon runs in the host's own namespaces: reboot(2) acts on the PID namespace of its caller."""
    found = host.own_namespaces(facts.kexec.calls)
    if not found:
        return None
    if not found.get("pid", True):
        return CheckFinding.fail_with(
            "khod runs in a PID namespace of its own, where reboot(2) does not jump: it would say EINVAL",
            "Run khod from its unit on the host, not in a container.",
        )
    if not found.get("user", True):
        return CheckFinding.fail_with(
            "khod runs in a user namespace of its own, where CAP_SYS_BOOT is not the host's: it would be EPERM",
            "Run khod from its unit on the host, not in a container.",
        )
    return CheckFinding.pass_with("khod runs in the host's namespaces")


def check_processors(facts: Facts) -> CheckFinding | None:
    """The kernel can switch off all other processors; otherwise loading fails, on some kernels only in the blackout."""
    calls = facts.kexec.calls
    if platform.machine() == "x86_64":
        if "tdx_pw_mce" not in host.processor_bugs(calls):
            return None
        return CheckFinding.warn_with(
            "These processors have the TDX erratum (tdx_pw_mce), with which 6.18 and 6.19 load no image: EOPNOTSUPP",
            "Try it first: `Kexec(load_only)`. Else switch TDX off in the firmware.",
        )
    if platform.machine() != "aarch64" or (possible := host.possible_processors(calls)) is None:
        return None
    stuck = ""
    if possible > 1 and not host.has_cpu_hotplug(calls):
        stuck = f"{possible} processors are possible, and this kernel was built without CONFIG_HOTPLUG_CPU"
    elif spinning := host.spinning_processors(calls):
        stuck = f"the firmware lets processors spin that nothing switches off: {join_names(spinning)}"
    elif any(
        arg.is_parameter("kvm-arm.mode") and arg.value == "protected" for arg in kernel_args(facts.observed.cmdline)
    ):
        stuck = "KVM is in protected mode (kvm-arm.mode=protected)"
    if stuck:  # cpus_are_stuck_in_kernel() in arch/arm64/kernel/smp.c; seen on 7.3.4
        return CheckFinding.fail_with(
            f"The kernel would load no image (EBUSY, `CPUs are stuck in the kernel`): {stuck}",
            "Boot a kernel with CONFIG_HOTPLUG_CPU=y on firmware with PSCI, without kvm-arm.mode=protected, or with "
            "maxcpus=1 nr_cpus=1.",
        )
    return CheckFinding.pass_with(f"The kernel can switch off all but one of {possible} processors")


def check_kexec(facts: Facts) -> CheckFinding:
    """Loading is not switched off, and a load can be undone."""
    if facts.kexec.load_disabled():
        return CheckFinding.fail_with(
            f"Loading is switched off: {LOAD_DISABLED} is 1",
            "It stays so until a reboot; find who sets it (sysctl.d).",
        )
    if (limit := facts.kexec.load_limit()) is not None and limit < UNDOABLE_LOAD:
        return CheckFinding.fail_with(
            f"{LOAD_LIMIT} allows {limit} more calls, and a load and its undo are two",
            "It cannot be raised until a reboot; find who sets it (sysctl.d).",
        )
    return CheckFinding.pass_with("Loading is allowed")


def check_lockdown(facts: Facts) -> CheckFinding:
    """Lockdown does not forbid driving KHO; the evidence says what it and Secure Boot allow of unsigned code."""
    level, secure = host.lockdown_level(facts.kexec.calls), host.secure_boot(facts.kexec.calls)
    boot = {True: "Secure Boot is on", False: "Secure Boot is off", None: "Secure Boot: not available"}[secure]
    if level in LOCKED and facts.probed.kernel and traits_of(facts.probed.kernel.generation).debugfs_writes:
        return CheckFinding.fail_with(
            f"Lockdown is {level}, {boot}: it lets nobody write debugfs's `finalize`",
            "Boot without lockdown (Secure Boot switches it on), or a kernel from 7.1 on.",
        )
    if level == "integrity" or secure:
        return CheckFinding.pass_with(f"{_level_words(level)}, {boot}: only signed images are loaded")
    return CheckFinding.pass_with(f"{_level_words(level)}, {boot}")


def _level_words(level: str | None) -> str:
    return f"Lockdown is {level}" if level else "Lockdown: not available"


def signatures_enforced(facts: Facts) -> bool | None:
    """Whether the loader accepts only signed images; None if the kernel's configuration cannot be read."""
    if host.lockdown_level(facts.kexec.calls) in LOCKED:
        return True
    return is_configured(facts.kexec.calls, "CONFIG_KEXEC_SIG_FORCE")


def check_foreign(facts: Facts) -> CheckFinding:
    """No other program has loaded an image or entered the active phase."""
    if facts.foreign:
        return CheckFinding.fail_with(
            f"Something other than khod uses KHO or kexec: {describe_kernel(facts.observed)}",
            "Finish it by hand, or put it back with: `Abort(force)`",
        )
    return CheckFinding.pass_with(f"No other user of KHO or kexec: {describe_kernel(facts.observed)}")


def check_state(facts: Facts) -> CheckFinding | None:
    """No abort has made this kernel forget preserved state."""
    if not facts.record.suspect or facts.record.boot_id != facts.observed.boot_id:
        return None
    refuse = facts.config.policy.after_forgetful_abort == "refuse"
    return CheckFinding(
        CheckResult.fail if refuse else CheckResult.warn,
        facts.record.suspect[0].upper() + facts.record.suspect[1:],
        'Reboot, or set policy.after_forgetful_abort = "warn".',
    )


def check_activations(facts: Facts) -> CheckFinding | None:
    """Few activations have failed in this boot: each may have leaked memory."""
    failed, most = facts.record.failed_activations, facts.config.policy.max_failed_activations
    if not failed or facts.record.boot_id != facts.observed.boot_id:
        return None
    return CheckFinding(
        CheckResult.fail if failed >= most else CheckResult.warn,
        f"{failed} activations failed in this boot, each may have leaked kernel memory (up to dt_max)",
        "Find the cause in the kernel log; policy.max_failed_activations sets the bound.",
    )


def check_crash(facts: Facts) -> CheckFinding:
    """Report the crash kernel, which is left as it is.

    One that is loaded in the active phase carries KHO's data along, which is harmless.
    """
    loaded = host.crash_loaded(facts.kexec.calls)
    if loaded is None:
        return CheckFinding.skip_with("This kernel has no slot for a crash kernel")
    return CheckFinding.pass_with(f"{'A' if loaded else 'No'} crash kernel is loaded; khod does not touch its slot")


def check_memory(facts: Facts) -> CheckFinding | None:
    """There is memory for dt_max bytes, which v3 allocates in one piece when it serializes."""
    kernel, calls = facts.probed.kernel, facts.kexec.calls
    if kernel is None or not traits_of(kernel.generation).copies_tree:
        return None
    if (free := host.available_memory(calls)) is None:
        return CheckFinding.skip_with("The kernel does not say how much memory is free")
    needed = int(calls.read_file(f"{KHO}/dt_max"), 0)
    if free < needed:
        return CheckFinding.fail_with(
            f"{free >> 20} MiB of memory are free, the state tree may take {needed >> 20} (dt_max)",
            f"Free memory, or write a smaller number to {KHO}/dt_max.",
        )
    return CheckFinding.pass_with(
        f"{free >> 20} MiB of memory are free, the state tree may take {needed >> 20} (dt_max)"
    )
