# SPDX-License-Identifier: LGPL-2.1-or-later
"""The build options and boot parameters of this kernel, where an absent file may result from either."""

import gzip
import re
import zlib

from khod.abi.calls import Calls
from khod.abi.proc import read_cmdline
from khod.kernel.next_arg import boolean_value, is_switched_on

KHO_BY_DEFAULT = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"
"""The initial value of kho_enable, in kernel/liveupdate/kexec_handover.c."""
OWN_LINE = re.compile(r'^CONFIG_CMDLINE="((?:\\.|[^"\\\n])*+)"$', re.MULTILINE)


def booted_with(calls: Calls, parameter: str) -> bool:
    """Whether a boolean parameter is switched on on the running kernel's command line."""
    return is_switched_on(read_cmdline(calls), parameter)


def kho_on(calls: Calls) -> bool:
    """Whether the running kernel has KHO on: by its command line, else by the default in its configuration."""
    said = boolean_value(read_cmdline(calls), "kho")
    return bool(is_configured(calls, KHO_BY_DEFAULT)) if said is None else said


def is_configured(calls: Calls, option: str) -> bool | None:
    """Whether the running kernel's configuration has `option` built in; None if it cannot be read."""
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
    """Whether a kernel's configuration has `option` built in."""
    return f"\n{option}=y\n" in f"\n{config}\n"


def is_not_set(config: str, option: str) -> bool:
    """Whether a kernel's configuration says that `option` is not set.

    That is False for an option that could not be asked for: RD_GZIP and others depend on BLK_DEV_INITRD, and are not
    mentioned without it.
    """
    return f"\n# {option} is not set\n" in f"\n{config}\n"


def ignores_line(config: str) -> bool:
    """Whether a kernel of this configuration boots only with its built-in command line: on x86, then on all others."""
    return is_set(config, "CONFIG_CMDLINE_OVERRIDE") or is_set(config, "CONFIG_CMDLINE_FORCE")


def booted_line(config: str, given: str) -> str:
    """Return the command line with which a kernel of this configuration boots if it is loaded with `given`.

    A built-in line comes before it on x86 (setup_arch() in arch/x86/kernel/setup.c), and after it elsewhere
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
    """Whether the kernel has `option`, by its configuration, else by symbols with the prefix; None if not known.

    Ask once: the answer holds for the whole boot, and the symbols are megabytes (half a second in a slow guest).
    """
    if (found := is_configured(calls, option)) is not None:
        return found
    try:
        return f" {prefix}".encode() in calls.read_file("/proc/kallsyms")
    except OSError:
        return None
