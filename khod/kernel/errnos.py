# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each errno means at each kernel call, and what to do next: data, read from the kernel's sources.

The sources are 6.18.15, 6.19.11, 7.3.4 and the v3 series; tests/unit/test_explain.py names the function behind each.
Several causes of an errno are listed from the most to the least likely. The tables of LUO's calls are in
`khod.kernel.luo`.
"""

import errno
from collections.abc import Mapping

from khod.model import Generation

Errnos = Mapping[int, tuple[str, str]]
"""By errno, what it means at a call, and what to do next."""

ENOTSUPP = 524  # include/linux/errno.h: internal to the kernel, but the signature check returns it to processes
SCRATCH_PARAMETERS = "kho_scratch= (kho_bootmem= where the kernel calls it that, as Linux 7.4 does)"
"""Both names, if it is unknown which one the kernel has; otherwise use KhoKernel.scratch_parameter."""
LARGER_SCRATCH = (
    f"khoctl check shows what is needed by region; boot with a larger {SCRATCH_PARAMETERS}, or use a smaller initrd."
)
LOG = "Look at the kernel log: journalctl -kb -g 'kexec|kho|luo|pefile|lockdown|ima'"
UNIT = "Run khod from its unit: systemctl restart kho-handover.service"
LIST_KEYS = "keyctl list %:.secondary_trusted_keys; keyctl list %:.platform"
COPY = "Copy the image again from its package and compare: sbverify --list IMAGE"

LOAD: Errnos = {
    errno.EPERM: (
        "kexec is switched off, its limit is used up, lockdown wants a signed image, or khod lacks CAP_SYS_BOOT",
        "Look at /proc/sys/kernel/kexec_load_disabled (1) and kexec_load_limit_reboot (0): both last until a reboot. "
        "Else at /sys/kernel/security/lockdown: under [integrity] use a signed image. Else: " + UNIT,
    ),
    errno.EINVAL: (
        "the image is empty or no regular file, the command line is too long, kernel and initrd need more than half "
        "of the memory, or (v3) a preserved range overlaps scratch",
        f"Run khoctl check with the same image. {LOG}",
    ),
    errno.EBUSY: ("another kexec load, unload or jump is under way", "Find who: pgrep -a kexec. Then try again."),
    errno.EBADF: ("the image was not opened for reading", "Name the image by its path."),
    errno.ETXTBSY: ("a process has the image open for writing", "Find it with fuser -v IMAGE, and wait for its end."),
    errno.EFBIG: ("the image or the initrd is larger than 4 GiB", "Use a smaller one."),
    errno.EIO: ("the image could not be read to its end, or changed meanwhile", "Copy it again, and look at dmesg."),
    errno.EINTR: ("a signal broke the reading off", "Try again."),
    errno.EACCES: (
        "IMA or another security module does not accept the file",
        "Look for `appraise` in journalctl -b _TRANSPORT=audit; sign the file for IMA (evmctl ima_sign), or correct "
        "the policy in /sys/kernel/security/ima/policy.",
    ),
    errno.ENOMEM: (
        "there is no memory for the image",
        "Free memory (free -m): kernel and initrd lie in it twice during the load, both unpacked.",
    ),
    errno.ENOEXEC: ("the loader knows no such image format", "Give a kernel image of this architecture."),
    errno.EADDRNOTAVAIL: (
        "kernel and initrd do not fit into the KHO scratch memory, or without KHO into any hole of the memory",
        LARGER_SCRATCH,
    ),
    errno.ENOENT: ("this kernel has no sha256, which its loader needs", "modprobe sha256_generic, or build it in."),
    errno.ENOSYS: ("this kernel has no kexec_file_load(2)", "Boot one built with CONFIG_KEXEC_FILE=y."),
    # The signature, checked where CONFIG_KEXEC_SIG_FORCE or IMA's secure boot policy enforces it.
    errno.ENODATA: (
        "the image is not signed and this kernel enforces signatures",
        "Use the distribution's signed image, or sign it: sbsign --key KEY --cert CERT --output SIGNED IMAGE",
    ),
    errno.EKEYREJECTED: (
        "the image's signature does not fit its contents, its key or hash is revoked, or the loader checks none",
        f"{COPY}. If it fits: look for the key in the blacklist, keyctl list %:.blacklist",
    ),
    errno.ENOKEY: (
        "the image is signed with a key this kernel does not trust",
        f"Compare sbverify --list IMAGE with: {LIST_KEYS}. Enroll it (mokutil --import CERT), or use another image.",
    ),
    errno.EKEYEXPIRED: ("the key the image is signed with has expired", f"Sign it with another. {LIST_KEYS}"),
    errno.EKEYREVOKED: ("the key the image is signed with is revoked", f"Sign it with another. {LIST_KEYS}"),
    errno.ELIBBAD: ("its PE headers or its signature's frame are damaged, or it is not a PE file at all", COPY),
    errno.EBADMSG: ("the image's signature cannot be parsed", COPY),
    errno.EMSGSIZE: ("the image's signature is longer than 64 KiB", "Sign it again, with fewer certificates in it."),
    errno.ENOPKG: (
        "the image's signature uses an algorithm this kernel lacks",
        "Compare sbverify --list IMAGE with /proc/crypto; sign with one that is there, or modprobe it.",
    ),
    ENOTSUPP: (
        "the kernel's ENOTSUPP: the signature is not a PKCS#7 one of revision 2.0",
        "Sign it with sbsign or pesign.",
    ),
}
"""kexec_file_load(2) on every architecture."""

NO_SIGNATURES = (
    "signatures are enforced, and this architecture's loader can check none",
    "Boot a kernel without CONFIG_KEXEC_SIG_FORCE; here IMA appraisal checks images instead.",
)
LOAD_ON: Mapping[str, Errnos] = {
    "x86_64": {
        errno.ENOEXEC: (
            "it is not a 64-bit bzImage that may lie above 4 GiB, or it is cut off",
            "Give the vmlinuz of a 64-bit kernel: file IMAGE says `bzImage`. Unpack a UKI or a zboot image first.",
        ),
        errno.EOPNOTSUPP: (
            "this processor has the TDX erratum, where 6.18 and 6.19 allow no kexec",
            "Switch TDX off in the firmware, or use another kernel.",
        ),
    },
    "aarch64": {
        # Its only loader returns EINVAL where others return ENOEXEC.
        errno.EINVAL: (
            "it is not an arm64 Image (an Image.gz, zboot or UKI must be unpacked), or one for another page size or "
            "byte order than this processor has, or the device tree with the new command line cannot be made",
            f"file IMAGE must say `Linux kernel ARM64 boot executable Image`. {LOG}",
        ),
        errno.EBUSY: (
            "another kexec call is under way, or processors are stuck in the kernel or cannot be switched off",
            "Try again; `CPUs are stuck` in the kernel log means: reboot instead (no PSCI, or no CPU hotplug).",
        ),
        errno.EADDRNOTAVAIL: (
            "kernel and initrd do not fit into the KHO scratch memory, or no place for the initrd lies within 32 GiB "
            "of the kernel",
            LARGER_SCRATCH,
        ),
    },
    "riscv64": {
        # The loader for Image files is tried last, and returns EINVAL.
        errno.EINVAL: (
            "it is not a riscv Image or ELF file, it is for another byte order, or the device tree cannot be made",
            f"file IMAGE must say `Linux kernel RISC-V boot executable Image`. {LOG}",
        ),
        errno.ENOEXEC: (
            "the running kernel's own purgatory is broken",
            "Use another kernel, and report it with the lines of: journalctl -kb -g 'rela|purgatory|symbol'",
        ),
        errno.EKEYREJECTED: NO_SIGNATURES,
    },
    "s390x": {
        # Its last loader accepts any file, so only the size shows a wrong one.
        errno.EINVAL: (
            "the command line is too long for this image (896 bytes for an old one), or it is not an s390 kernel",
            f"Shorten the command line, or give the `image` file of a kernel package. {LOG}",
        ),
        errno.EKEYREJECTED: (
            "the image has no signature appended or one that does not fit, and this system was booted secure",
            "tail -c 28 IMAGE must say `~Module signature appended~`; sign it with the kernel's scripts/sign-file.",
        ),
    },
    "ppc64le": {
        errno.ENOEXEC: ("it is not a 64-bit PowerPC ELF file", "Give the vmlinux, uncompressed, of this byte order."),
        errno.ETXTBSY: (
            "the image would lie over the running kernel or over the tables of the I/O host bridges, or a process "
            "has its file open for writing",
            f"fuser -v IMAGE; else boot with scratch elsewhere ({SCRATCH_PARAMETERS}), or a smaller image.",
        ),
        errno.EINVAL: (
            "the command line is too long, the image needs more than half of the memory, or the next kernel's device "
            "tree cannot be made",
            f"Shorten the command line, or give a smaller initrd. {LOG}",
        ),
        errno.EKEYREJECTED: NO_SIGNATURES,
    },
    "loongarch64": {
        errno.ENOEXEC: ("it is not a LoongArch EFI image or ELF file", "Give the vmlinux.efi or vmlinux of a kernel."),
        errno.EINVAL: (
            "the command line with the initrd's place in it is too long, or the image's size is 0",
            "Shorten the command line: `initrd=` and its address are added to it. Else give another image.",
        ),
        errno.EKEYREJECTED: NO_SIGNATURES,
    },
}
"""What differs by architecture, by the name uname -m gives it."""

UNLOAD: Errnos = {
    errno.EPERM: (
        "kexec is switched off or its limit is used up, which forbids the unload too, or khod lacks CAP_SYS_BOOT",
        "Look at /proc/sys/kernel/kexec_load_disabled and kexec_load_limit_reboot. The image stays until a reboot: "
        "do not run systemctl kexec or kexec -e.",
    ),
    errno.EBUSY: (
        "another kexec load or jump is under way",
        "Try again: khoctl abort. /sys/kernel/kexec_loaded must read 0 in the end.",
    ),
    errno.EINVAL: ("this kernel does not know the flag KEXEC_FILE_UNLOAD", "Reboot; do not run kexec -e."),
    errno.ENOSYS: LOAD[errno.ENOSYS],
}
"""kexec_file_load(2) with KEXEC_FILE_UNLOAD."""

FILES: Errnos = {
    errno.EACCES: ("khod may not open the file", UNIT),
    errno.EROFS: ("it is mounted read-only", "Look for ProtectKernelTunables= in: systemctl cat kho-handover.service"),
}
"""Opening a file of sysfs or debugfs."""
DEBUGFS: Errnos = {
    **FILES,
    errno.EPERM: (
        "lockdown closes what can be written in debugfs, already at its level integrity",
        "cat /sys/kernel/security/lockdown: Secure Boot switches it on. Boot without it.",
    ),
    errno.ENOENT: (
        "debugfs does not show it",
        "mount -t debugfs debugfs /sys/kernel/debug, and look at /sys/kernel/debug/kho/out",
    ),
}
SYSFS_ON: Errnos = {
    **FILES,
    # v3 returns EINVAL for every cause; only the log has the cause.
    errno.EINVAL: (
        "the kernel could not serialize its state",
        "The kernel log has the cause in `kho failed to serialize state: N`: -1 a producer vetoed, -12 no memory (free "
        "some, or lower /sys/kernel/kho/dt_max), -3 the tree outgrew dt_max (raise it).",
    ),
    errno.ENOMEM: ("there is no scratch memory", "Boot with kho_scratch=512M."),
    errno.ENOENT: (
        "the tree is not there: somebody left the active phase meanwhile",
        "cat /sys/kernel/kho/active; find who wrote 0, then try again.",
    ),
}
SERIALIZE: Mapping[int, tuple[str, str]] = {
    1: ("a producer in the kernel vetoed", "Find out which: its lines stand before that one in journalctl -k."),
    3: ("the tree outgrew dt_max", "Write a larger number to /sys/kernel/kho/dt_max."),
    12: (
        "there is no memory for the tree",
        "Free some (free -m), or write a smaller number to /sys/kernel/kho/dt_max.",
    ),
}
"""The meaning of N in v3's own line about a failed activation, `kho failed to serialize state: -N`."""
FINALIZE_ON: Errnos = {
    **DEBUGFS,
    errno.EEXIST: (
        "it is finalized already: something else did it",
        "Find out who, or: `Abort(force)`",
    ),
    # libfdt's error numbers are passed through as if they were errnos: FDT_ERR_NOSPACE is 3.
    errno.ESRCH: (
        "libfdt's NOSPACE: the producers' entries do not fit into the one page the tree has",
        "Let fewer producers take part: ls /sys/kernel/debug/kho/out/sub_fdts, and unload their modules.",
    ),
    errno.ENOMEM: ("there is no memory to list the preserved pages", "Free memory: free -m"),
    errno.EINVAL: (
        "a producer in the kernel gave a range that is not a whole number of pages",
        "Round every reserve_mem= up to whole pages, or unload the module that was added last: lsmod",
    ),
    errno.EBUSY: (
        "a producer in the kernel is not ready",
        "Try again; if it stays so, find it by what is missing in /sys/kernel/debug/kho/out/sub_fdts.",
    ),
}
REFRESH_ON: Errnos = {
    **DEBUGFS,
    errno.EOPNOTSUPP: ("KHO is switched off", "Boot with kho=on on the command line."),
    errno.ENOMEM: ("there is no memory to list the preserved pages", "Free memory: free -m"),
}
ACTIVATE: Mapping[Generation, Errnos] = {
    Generation.none: {**REFRESH_ON, **FINALIZE_ON, **SYSFS_ON},
    Generation.sysfs: SYSFS_ON,
    Generation.finalize: FINALIZE_ON,
    Generation.finalize_no_abort: REFRESH_ON,
    Generation.stateless: DEBUGFS,
}
"""Entering the active phase, and reading the tree then; `none` is for an unknown generation."""

GONE_ALREADY = (
    "a producer in the kernel did not let go; its list of preserved pages is gone already, and it still says finalized",
    "Reboot before the next handover: what it would carry cannot be told. Do not run kexec -e.",
)
SYSFS_OFF: Errnos = {
    **FILES,
    errno.ENOMEM: (
        "there is no scratch memory, so the kernel refuses even the 0, and cannot be active either",
        "cat /sys/kernel/kho/active /sys/kernel/kho/scratch_len",
    ),
    errno.ENOENT: (
        "the file is not there any more",
        "ls /sys/kernel/kho: without it nothing is active, and nothing is left to leave.",
    ),
}
FINALIZE_OFF: Errnos = {
    **DEBUGFS,
    errno.ENOENT: (
        "it was not finalized any more, or debugfs is not mounted",
        "cat /sys/kernel/debug/kho/out/finalize: 0 was wanted. Else: mount -t debugfs debugfs /sys/kernel/debug",
    ),
    errno.EBUSY: GONE_ALREADY,
    errno.EINVAL: GONE_ALREADY,
    errno.ENOMEM: GONE_ALREADY,
}
DEACTIVATE: Mapping[Generation, Errnos] = {
    Generation.none: {**FINALIZE_OFF, **SYSFS_OFF},
    Generation.sysfs: SYSFS_OFF,
    Generation.finalize: FINALIZE_OFF,
}
"""Leaving the active phase, for generations that have one."""

FROZEN_BACK = (
    "Every file was thawed again. `Freeze failed for token` in the kernel log names the token and its handler."
)
EXECUTE: Errnos = {
    errno.EPERM: ("khod lacks CAP_SYS_BOOT", UNIT),
    errno.EINVAL: (
        "no image is loaded, khod runs in a container's PID namespace, or a preserved file could not be frozen",
        "cat /sys/kernel/kexec_loaded: where it is 0 something unloaded it, try again. khoctl check says whether khod "
        "is in the host's PID namespace. " + FROZEN_BACK,
    ),
    errno.EBUSY: (
        "a kexec load is under way, or a preserved file is in use and could not be frozen",
        f"pgrep -a kexec; then try again. {FROZEN_BACK}",
    ),
    errno.EAGAIN: (
        "KHO could not list the preserved pages (6.19 to 7.0)",
        "`kho_finalize failed` in the kernel log has the cause, -12 is memory: free some, then try again.",
    ),
    errno.ENOSPC: ("there is no room to write down all sessions or files", "Hand over fewer files, then try again."),
    errno.ENOMEM: (
        "there is no memory to freeze a preserved file, or devices could not be suspended for a kexec jump",
        f"Free memory: free -m. {FROZEN_BACK} Load the image without kexec --load-preserve-context.",
    ),
}
"""reboot(2) with LINUX_REBOOT_CMD_KEXEC; errnos of a file's own driver at its freeze are passed through."""
