"""The kernel's errnos in words: what it means at this call, and what to do next."""

import errno
from collections.abc import Mapping
from typing import TypedDict

from khod.errors import Failed, errno_text
from khod.kernel.protocol import AbortKind
from khod.model import Step

Errnos = Mapping[int, tuple[str, str]]
"""What an errno means at a call, and what to do next."""

LOAD: Errnos = {
    errno.EPERM: (
        "kexec is locked",
        "Look at /proc/sys/kernel/kexec_load_disabled and kexec_load_limit_reboot: both "
        "stay as they are until a reboot. Else: lockdown, or khod lacks CAP_SYS_BOOT.",
    ),
    errno.ENOEXEC: ("the loader knows no such image format", "Give a kernel image of this architecture."),
    errno.EADDRNOTAVAIL: (
        "kernel and initrd do not fit into the KHO scratch memory",
        "Boot with a larger kho_scratch=, or use a smaller initrd.",
    ),
    errno.EINVAL: (
        "the kernel refuses image, command line or state",
        "Look at the kernel log; a preserved range that overlaps scratch ends here too.",
    ),
    errno.ENOMEM: ("no memory for the image", "Free memory; kernel and initrd must lie in it twice during the load."),
    errno.EBUSY: ("another kexec load is under way", "Wait for it, then try again."),
    errno.ENODATA: ("the image is not signed and this kernel enforces signatures", "Use a signed image."),
    errno.EKEYREJECTED: ("the image's signature does not fit its contents", "Copy the image again; it was changed."),
    errno.ENOKEY: (
        "the image is signed with a key this kernel does not trust",
        "Enroll the key, or use another image.",
    ),
    errno.ELIBBAD: ("the image's signature is damaged", "Copy the image again."),
    errno.EBADMSG: ("the image's signature is damaged", "Copy the image again."),
    errno.EMSGSIZE: ("the image's signature is damaged", "Copy the image again."),
    errno.ENOPKG: ("the image's signature uses an algorithm this kernel lacks", "Sign it with one it has."),
    errno.ENOSYS: ("this kernel has no kexec_file_load(2)", "Boot one built with CONFIG_KEXEC_FILE=y."),
}
ACTIVATE: Errnos = {
    # v3 gives EINVAL whatever the cause; the cause is in the log alone.
    errno.EINVAL: (
        "the kernel could not serialize its state",
        "The kernel log has the cause in `kho failed to serialize "
        "state: N`: -1 a producer vetoed, -12 no memory, -3 the tree outgrew dt_max "
        "(raise /sys/kernel/kho/dt_max).",
    ),
    errno.ENOMEM: ("there is no scratch memory", "Boot with kho_scratch=512M."),
    errno.EEXIST: ("something else entered the active phase a moment ago", "Find out who, or: khoctl abort --force"),
}
EXECUTE: Errnos = {
    errno.EINVAL: ("no image is loaded", "Something unloaded it; try again."),
    errno.EPERM: ("khod lacks CAP_SYS_BOOT", "Run khod from its unit."),
}
TABLES = {Step.load: LOAD, Step.activate: ACTIVATE, Step.execute: EXECUTE}
CALLS = {
    Step.activate: "The kernel did not enter the active phase",
    Step.load: "The kernel did not take the image",
    Step.execute: "The kernel came back from the jump",
}


class Words(TypedDict):
    """What an error of ours is made of."""

    what: str
    where: str
    remedy: str


def words(what: str, table: Errnos, error: OSError, otherwise: str = "Look at the kernel log.") -> Words:
    """Put an errno in words: `what` failed, what the errno means there, and what to do next."""
    meaning, remedy = table.get(error.errno or 0, ("", otherwise))
    because = f", {meaning}" if meaning else ""
    return {"what": f"{what}: {errno_text(error)}{because}", "where": str(error.filename or ""), "remedy": remedy}


def explain(step: Step, error: OSError) -> Failed:
    """Make a sentence of the errno a kernel call of `step` ended in."""
    return Failed(**words(CALLS[step], TABLES[step], error))


FORGOT = {
    AbortKind.forgets: "an abort made this kernel forget what was preserved before finalize (6.16-6.18 do); "
    "what a handover would carry from here on cannot be told until a reboot",
}
