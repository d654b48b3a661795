"""Checks of the next kernel: whether this host can load it, and whether it would take over what is left to it."""

import mmap
from collections.abc import Callable

from khod import cmdline as lines
from khod.formats import Answer, understood
from khod.images.kernel import Kernel, Signature
from khod.kernel import host
from khod.kernel.placement import NoRoom, place, segments
from khod.kernel.written import written
from khod.model import CheckResult, Fate
from khod.preflight.facts import Facts, Finding, shown
from khod.preflight.kernel import signatures_enforced
from khod.target import Target
from khod.text import join_names, printable

MAX_SHOWN = 3
UNREADABLE = "The image could not be looked at: see the check `image`"


def _of_target(judge: Callable[[Facts, Target, Kernel], Finding]) -> Callable[[Facts], Finding | None]:
    """A check of an image that was understood; without one there is nothing to say, or no way to."""

    def check(facts: Facts) -> Finding | None:
        if facts.target is None:
            return None
        if facts.target.apart is None:
            return Finding.skipped(UNREADABLE)
        return judge(facts, facts.target, facts.target.apart.about)

    return check


def image(facts: Facts) -> Finding | None:
    """It is a kernel this machine's loader takes, whole."""
    target = facts.target
    if target is None:
        return None
    if error := target.wrong.get("image"):
        return Finding.of(error)
    assert target.apart is not None, "either taken apart or wrong"
    about = target.apart.about
    if not about.five_level and host.five_level_paging(facts.kexec.calls):
        return Finding.fail(
            f"{target.kernel.name} cannot be started with five levels of page tables, which this kernel runs with: "
            "the loader would say ENOEXEC",  # bzImage64_probe(): XLF_5LEVEL
            "Give --image a kernel built with CONFIG_X86_5LEVEL=y, or boot this one with no5lvl.",
        )
    return Finding.passed(
        f"{target.kernel.name}: {' with '.join(target.apart.formats)}, {about.version or 'no version'}, {about.arch}, "
        f"{about.size / 2**20:.1f} MiB, {about.memory / 2**20:.1f} MiB in memory"
    )


def initrd(facts: Facts) -> Finding | None:
    """It is an archive the kernel unpacks, with something to start in it."""
    target = facts.target
    if target is None:
        return None
    if error := target.wrong.get("initrd"):
        return Finding.of(error)
    no_root = _no_root(target)
    if target.initrd is None:
        if not no_root:
            return Finding.passed("None; the kernel mounts root= by itself")
        return Finding.fail(
            f"No initrd, and {no_root}: the next kernel would panic",
            "Give --initrd, or the root with --append root=...",
        )
    files, unpacked = sum(one.files for one in target.initrds), sum(one.unpacked for one in target.initrds)
    what = f"{target.initrd.name}: {files} {'file' if files == 1 else 'files'}, {unpacked / 2**20:.1f} MiB unpacked"
    init = lines.init(target.cmdline)
    if any(one.init for one in target.initrds):
        return Finding.passed(f"{what}, /{init} is there")
    if not no_root:
        return Finding.warn(
            f"{what}, and no /{init} in it: the kernel mounts root= by itself",
            "Be sure that the drivers of the root are built in.",
        )
    return Finding.fail(
        f"{what}, no /{init} in it, and {no_root}: the next kernel would panic",
        "Give the initrd of this kernel, or the root with --append root=...",
    )


def _no_root(target: Target) -> str:
    """Why the kernel would find no root by itself, "" where it would."""
    if lines.mounts_root(target.cmdline):
        return ""
    root = lines.root(target.cmdline)
    return f"only an initrd's programs find root={printable(root)}" if root else "no root= on the command line"


def cmdline(facts: Facts) -> Finding | None:
    """Nothing that KHO needs is missing from it."""
    if (target := facts.target) is None:
        return None
    lost = list(lines.losses(target.words))
    if not lost:
        return _torn(target) or Finding.passed(target.cmdline)
    result = CheckResult.fail if lines.off(target.words) else CheckResult.warn
    return Finding(result, "; ".join(lost), "Add it again with --append, or reuse the running line: --reuse-cmdline")


def _torn(target: Target) -> Finding | None:
    """Words that the running kernel does not have and the next one would not read as they were written."""
    torn = [word.text for word in target.words if word.fate is Fate.added and lines.torn(word.text)]
    if not torn:
        return None
    return Finding.warn(
        f"The next kernel ends a word at the byte 0xA0, which is within a character of: {join_names(torn, MAX_SHOWN)}",
        'Put the value between double quotes, as in root="LABEL=...", or use other characters.',
    )


@_of_target
def formats(facts: Facts, target: Target, about: Kernel) -> Finding:
    """It reads what this kernel writes."""
    if (kernel := facts.probed.kernel) is None:
        return Finding.skipped("The running kernel has no KHO")
    found = understood(written(facts.kexec.calls, kernel.generation), about)
    name = about.version or target.kernel.name
    modules = f"; only a module can read {', '.join(found.unread)}, which the image does not show"
    override = 'to jump all the same: checks.formats = "warn" in /etc/kho/khod.toml'
    if found.answer is Answer.different:
        return Finding.fail(
            f"{name} would take over nothing, or not all: {found.why}",
            f"Choose a kernel that reads the same formats, or reboot without keeping state; {override}",
        )
    if found.answer is Answer.unknown:
        warn = facts.config.policy.unknown_format == "warn"
        return Finding(
            CheckResult.warn if warn else CheckResult.fail,
            f"It cannot be told whether {name} takes the state over: {found.why}",
            'If you know that it does: policy.unknown_format = "warn" in /etc/kho/khod.toml',
        )
    return Finding.passed(f"{name} reads what this kernel writes: {found.why}{modules if found.unread else ''}")


@_of_target
def signature(facts: Facts, target: Target, about: Kernel) -> Finding:
    """It is signed where the loader asks for that; whether the signature is good only the loader finds out."""
    assert target.apart is not None, "what _of_target() has looked at"
    enforced, formats = signatures_enforced(facts), target.apart.formats
    subject = target.kernel.name if len(formats) == 1 else f"The kernel in {target.kernel.name}"
    if about.signature is not Signature.none:
        return Finding.passed(f"{subject} is signed ({about.signature.value})")
    if enforced:
        return Finding.fail(
            f"{subject} is not signed, and this kernel loads signed images alone: it would say ENODATA, or "
            "ELIBBAD of an image that is no PE",  # seen on 7.3.4, of one built without CONFIG_EFI_STUB
            "Use a signed image (Debian: linux-image-VERSION-amd64, not -unsigned), or sign it with a key this kernel "
            "trusts (sbsign), for which it must be built with CONFIG_EFI_STUB."
            + (" The unified image's own signature is nothing to kexec." if "UKI" in formats else ""),
        )
    if enforced is None:
        return Finding.warn(
            f"{subject} is not signed, and this kernel does not say whether it insists on that",
            "Look for CONFIG_KEXEC_SIG_FORCE in its configuration.",
        )
    return Finding.passed(f"{subject} is not signed; this kernel does not insist on that")


@_of_target
def fit(facts: Facts, target: Target, about: Kernel) -> Finding:
    """Kernel, initrd and the loader's own segments find room in scratch, region by region."""
    kernel = facts.probed.kernel
    if kernel is None:
        return Finding.skipped("The running kernel has no KHO, and no scratch")
    scratch, initrd_size = kernel.scratch(), target.initrd.size if target.initrd else 0
    line = len(target.cmdline.encode()) + 1
    wanted = segments(about, initrd_size, line, kernel.generation, len(scratch), _tree(facts))
    if wanted is None:
        return Finding.skipped(f"How the loader of {about.arch} places its segments is not known here")
    if wrong := _contradiction(about):
        return wrong
    found = place(wanted, scratch)
    if isinstance(found, NoRoom):
        above = about.pref_address if found.segment.name == "kernel" else 0
        return Finding.fail(
            f"The {found.segment.name} takes {mib(found.segment.size)} and the largest hole left in scratch"
            f"{f' from {above:#x} on, the pref_address in its header,' if above else ''} is {mib(found.hole)}: "
            f"{shown(scratch)}; the kernel would say EADDRNOTAVAIL",
            f"Boot with a larger {kernel.scratch_parameter}, or use a smaller initrd.",
        )
    at = next(one.at for one in found if one.segment.name == "kernel")
    if not about.relocatable and about.pref_address not in (0, at):
        return Finding.fail(
            f"The image is not relocatable: it would be loaded at {at:#x}, and move itself to {about.pref_address:#x}, "
            "over what lies there and is handed over",
            "Use a kernel built with CONFIG_RELOCATABLE=y.",
        )
    total = sum(segment.size for segment in wanted)
    return Finding.passed(
        f"Kernel ({mib(about.memory)}), initrd ({mib(initrd_size)}) and what the loader adds ({mib(total)} in all) "
        f"fit into scratch: {shown(scratch)}"
    )


def _contradiction(about: Kernel) -> Finding | None:
    """What no header can say of itself: sanity_check_segment_list() in kernel/kexec_core.c says EINVAL."""
    loaded, room = about.size - about.setup_size, -(-about.memory // mmap.PAGESIZE) * mmap.PAGESIZE
    if about.format != "bzImage" or loaded <= room:
        return None
    return Finding.fail(
        f"The image is damaged: its header wants {mib(room)} in memory (init_size), and {mib(loaded)} go there",
        "Copy the image again from its package.",
    )


def _tree(facts: Facts) -> int:
    """Bytes of the tree that v3 copies into the image: what it is where it can be told, else 0."""
    return len(facts.outgoing.root) if facts.outgoing and facts.observed.active else 0


def mib(size: int) -> str:
    """A size in MiB, so that a difference of a page shows."""
    return f"{size / 2**20:.3f}".rstrip("0").rstrip(".") + " MiB"
