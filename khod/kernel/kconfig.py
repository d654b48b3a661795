# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this kernel was built with and booted with, where an absent file may mean either."""

import gzip
import re
import zlib

from khod.abi.calls import Calls
from khod.kernel.next_arg import boolean_value, is_switched_on

KHO_BY_DEFAULT = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"
"""What kho_enable begins with, in kernel/liveupdate/kexec_handover.c."""
OWN_LINE = re.compile(r'^CONFIG_CMDLINE="((?:\\.|[^"\\\n])*+)"$', re.MULTILINE)


def booted_with(calls: Calls, parameter: str) -> bool:
    """Tell whether a boolean parameter is on the running kernel's command line."""
    return is_switched_on(calls.read_file("/proc/cmdline").decode(errors="surrogateescape"), parameter)


def kho_on(calls: Calls) -> bool:
    """Tell whether the running kernel has KHO on: by its command line, else by its configuration's default."""
    said = boolean_value(calls.read_file("/proc/cmdline").decode(errors="surrogateescape"), "kho")
    return bool(is_configured(calls, KHO_BY_DEFAULT)) if said is None else said


def is_configured(calls: Calls, option: str) -> bool | None:
    """Ask the running kernel's configuration whether it has `option` built in; None where it cannot be read."""
    release = calls.read_file("/proc/sys/kernel/osrelease").decode().strip()
    for path in ("/proc/config.gz", f"/usr/lib/modules/{release}/config", f"/boot/config-{release}"):
        try:
            raw = calls.read_file(path)
            config = gzip.decompress(raw) if path.endswith(".gz") else raw
        except (OSError, EOFError, zlib.error):
            continue
        return is_set(config.decode(errors="replace"), option)
    return None


def is_set(config: str, option: str) -> bool:
    """Tell whether a kernel's configuration has `option` built in."""
    return f"\n{option}=y\n" in f"\n{config}\n"


def is_not_set(config: str, option: str) -> bool:
    """Tell whether a kernel's configuration says that `option` was left out; where it could not be asked, it does not.

    RD_GZIP and the like depend on BLK_DEV_INITRD: where that is left out, they are not mentioned.
    """
    return f"\n# {option} is not set\n" in f"\n{config}\n"


def ignores_line(config: str) -> bool:
    """Tell whether a kernel of this configuration boots with its own command line alone: x86, then all others."""
    return is_set(config, "CONFIG_CMDLINE_OVERRIDE") or is_set(config, "CONFIG_CMDLINE_FORCE")


def booted_line(config: str, given: str) -> str:
    """Give the command line that a kernel of this configuration boots with where it is loaded with `given`.

    A built-in one stands before it on x86 (setup_arch() in arch/x86/kernel/setup.c), and behind it elsewhere
    (early_init_dt_scan_chosen() in drivers/of/fdt.c, bootcmdline_init() in arch/loongarch/kernel/setup.c).
    """
    found = OWN_LINE.search(config)
    own = re.sub(r"\\(.)", r"\1", found[1]) if found else ""
    if ignores_line(config):
        return own
    if own and is_set(config, "CONFIG_CMDLINE_BOOL"):
        return f"{own} {given}"
    if own and is_set(config, "CONFIG_CMDLINE_EXTEND"):
        return f"{given} {own}"
    return given


def built_in(calls: Calls, option: str, prefix: str) -> bool | None:
    """Ask the kernel's configuration, else for symbols with the prefix; None where neither can be read.

    Ask once: it holds for the whole boot, and the symbols are megabytes (half a second in a slow guest).
    """
    if (found := is_configured(calls, option)) is not None:
        return found
    try:
        return f" {prefix}".encode() in calls.read_file("/proc/kallsyms")
    except OSError:
        return None
