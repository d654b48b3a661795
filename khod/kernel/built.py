"""What this kernel was built with and booted with, where an absent file may mean either."""

import gzip
import zlib

from khod.abi.calls import Calls


def switched_on(calls: Calls, parameter: str) -> bool:
    """Tell whether a boolean parameter is on the command line, as kstrtobool() reads it."""
    words = (word.partition("=") for word in calls.read("/proc/cmdline").decode(errors="replace").split())
    return any(name == parameter and value in ("", "1", "y", "Y", "on") for name, _, value in words)


def built_in(calls: Calls, option: str, prefix: str) -> bool | None:
    """Ask the kernel's configuration, else for symbols with the prefix; None where neither can be read.

    Ask once: it holds for the whole boot, and the symbols are megabytes (half a second in a slow guest).
    """
    release = calls.read("/proc/sys/kernel/osrelease").decode().strip()
    for path in ("/proc/config.gz", f"/usr/lib/modules/{release}/config", f"/boot/config-{release}"):
        try:
            raw = calls.read(path)
            config = gzip.decompress(raw) if path.endswith(".gz") else raw
        except (OSError, EOFError, zlib.error):
            continue
        return f"\n{option}=y".encode() in config
    try:
        return f" {prefix}".encode() in calls.read("/proc/kallsyms")
    except OSError:
        return None
