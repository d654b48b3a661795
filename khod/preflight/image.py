"""Checks of the next kernel: whether this host can load it, and whether it would take over what is left to it."""

import mmap
import re
from collections.abc import Callable

from khod.images.accepted import INITRD
from khod.images.kernel import Kernel, Signature
from khod.kernel import cmdline as lines
from khod.kernel import host
from khod.kernel.formats import written
from khod.kernel.kconfig import ignores_line, is_not_set, is_set
from khod.kernel.next_arg import kernel_args, parse, switched
from khod.model import CheckResult, Fate, Generation
from khod.preflight.facts import Facts, Finding, shown
from khod.preflight.kernel import signatures_enforced
from khod.target.compatibility import Answer, Effect, Understood, next_kho, understood
from khod.target.placement import NoRoom, place, segments
from khod.target.target import Target
from khod.text import join_names, printable, shorten

MAX_SHOWN = 3
MAX_LINE_SHOWN = 200
"""Characters of a command line that is another's."""
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
    about = target.apart.about if target.apart else None
    if target.initrd is None or not any(one.formats for one in target.initrds):
        return _no_initrd(target, about)
    if wrong := _not_built_for(target, about):
        return wrong
    return _archives(target, about)


def _no_initrd(target: Target, about: Kernel | None) -> Finding:
    """Judge a next kernel that is given no archive, or nothing but a boot configuration."""
    what = "No initrd" if target.initrd is None else f"{target.initrd.name} holds a boot configuration and no archive"
    if _built_in_initramfs(about):
        return Finding.passed(f"{what}; the image has an initramfs built in (CONFIG_INITRAMFS_SOURCE)")
    if not (no_root := _no_root(target)):
        return Finding.passed(f"{what}; the kernel mounts root={printable(lines.root(target.booted_line))} itself")
    return _without_root(
        target,
        about,
        f"{what}, and {no_root}",
        "Give --initrd, or the root with --append root=...",
    )


def _not_built_for(target: Target, about: Kernel | None) -> Finding | None:
    """Find what the initrd needs and the next kernel was built without, where the image shows its configuration."""
    if about is None or about.config is None:
        return None
    wanted = {INITRD, *(option for one in target.initrds for option in one.needs)}
    missing = sorted(option for option in wanted if is_not_set(about.config, option))
    if not missing:
        return None
    return Finding.fail(
        f"{about.version or target.kernel.name} was built without {join_names(missing, MAX_SHOWN)}: it would not "
        f"unpack {target.initrd.name if target.initrd else 'the initrd'}",
        "Pack the initrd as that kernel unpacks it (`COMPRESS=` in initramfs.conf, `compress=` in dracut.conf), or "
        "choose another kernel.",
    )


def _archives(target: Target, about: Kernel | None) -> Finding:
    """Judge what is in the archives: something to start, and modules of the kernel that they are given to."""
    assert target.initrd is not None, "asked before"
    files, unpacked = sum(one.files for one in target.initrds), sum(one.unpacked for one in target.initrds)
    what = f"{target.initrd.name}: {files} {'file' if files == 1 else 'files'}, {unpacked / 2**20:.1f} MiB unpacked"
    if any(one.bootconfig for one in target.initrds):
        what += ", a boot configuration at its end, whose words were not inspected"
    init, found = lines.init(target.booted_line), any(one.init for one in target.initrds)
    if opaque := next((one.opaque for one in target.initrds if one.opaque), ""):
        return Finding.warn(
            f"{what}; not inspected: {opaque}{f'; /{init} is in what was' if found else ''}",
            "Pack it with another compression (zstd, xz --check=crc32, gzip), so that khod can look into it.",
        )
    modules, version = {tree for one in target.initrds for tree in one.modules}, about.version if about else ""
    if modules and version and version not in modules:
        return Finding.warn(
            f"{what}, with modules for {join_names(sorted(modules), MAX_SHOWN)}; the image is {version}, and loads "
            "none of them",
            f"Give the initrd that was made for {version}, for instance with: khoctl check --kernel {version}",
        )
    if found:
        needed = sorted(option for one in target.initrds for option in one.needs)
        unseen = f"; not inspected: whether the kernel has {join_names(needed, MAX_SHOWN)}, it shows no configuration"
        return Finding.passed(
            f"{what}, /{init} is there{unseen if needed and (about is None or about.config is None) else ''}"
        )
    if _built_in_initramfs(about):
        return Finding.passed(f"{what}, no /{init} in it; the image has an initramfs built in")
    if not (no_root := _no_root(target)):
        return Finding.warn(
            f"{what}, and no /{init} in it: the kernel mounts root= itself",
            "Be sure that the drivers of the root are built in.",
        )
    return _without_root(
        target,
        about,
        f"{what}, no /{init} in it, and {no_root}",
        "Give the initrd of this kernel, or the root with --append root=...",
    )


def _no_root(target: Target) -> str:
    """Why the kernel would find no root by itself, "" where it would."""
    if lines.mounts_root(target.booted_line):
        return ""
    root = lines.root(target.booted_line)
    return f"only an initrd's programs find root={printable(root)}" if root else "no root= on the command line"


def _without_root(target: Target, about: Kernel | None, what: str, remedy: str) -> Finding:
    """Judge a kernel that finds no root by its command line: certain, unless a boot configuration adds words to it."""
    if any(one.bootconfig for one in target.initrds) and _reads_bootconfig(target, about):
        return Finding.warn(
            f"{what}; not inspected: the boot configuration, whose `kernel` keys the next kernel adds to its command "
            "line",
            "Be sure that it names the root, and what the kernel sets it up with (dm-mod.create).",
        )
    return Finding.fail(f"{what}: the next kernel would panic", remedy)


def _reads_bootconfig(target: Target, about: Kernel | None) -> bool:
    """Whether the next kernel uses the boot configuration of its initrd: setup_boot_config() in init/main.c."""
    config = about.config if about and about.config else ""
    asked = any(arg.param == "bootconfig" for arg in kernel_args(target.booted_line))
    return (asked or is_set(config, "CONFIG_BOOT_CONFIG_FORCE")) and not is_not_set(config, "CONFIG_BOOT_CONFIG")


def _built_in_initramfs(about: Kernel | None) -> bool:
    """Whether the image's configuration says that a whole initramfs is in it, not just the default's /dev and /root."""
    config = about.config if about else None
    return config is not None and re.search(r'^CONFIG_INITRAMFS_SOURCE="[^"]+"$', config, re.MULTILINE) is not None


def cmdline(facts: Facts) -> Finding | None:
    """Nothing that KHO needs is missing from it."""
    if (target := facts.target) is None:
        return None
    about, kernel = target.apart.about if target.apart else None, facts.probed.kernel
    mainline = kernel is not None and kernel.generation is not Generation.sysfs
    is_on = next_kho(about, target.booted_line) if about and mainline else None
    if about is not None and about.config is not None and ignores_line(about.config):
        return Finding(
            CheckResult.fail if is_on is False else CheckResult.warn,
            f"{about.version or target.kernel.name} boots only with the command line it was built with: "
            f"{shorten(printable(target.booted_line), MAX_LINE_SHOWN) or 'an empty one'}",
            "Choose a kernel built without CONFIG_CMDLINE_OVERRIDE and CONFIG_CMDLINE_FORCE.",
        )
    lost = [word.lost for word in target.words if word.lost and not (is_on and parse(word.text).named("kho"))]
    fates = {word.fate for word in target.words if word.lost}
    remedy = "Add it again with --append, or reuse the running line: --reuse-cmdline"
    if Fate.added in fates:
        others = f". {remedy}" if Fate.removed in fates else ""
        remedy = f"Leave out what you added, unless you mean it{others}"
    if is_on is False and not lines.off(target.words):
        lost.append(
            "the next kernel has Kexec HandOver off: its command line and its configuration do not switch it on"
        )
        remedy = "Switch it on: --append kho=on"
    if lost:
        off = is_on is False or (is_on is None and lines.off(target.words))
        return Finding(CheckResult.fail if off else CheckResult.warn, "; ".join(lost), remedy)
    if is_on is None and mainline and about is not None and switched(target.booted_line, "kho") is None:
        return Finding.warn(
            f"{target.cmdline}; not inspected: whether the next kernel has Kexec HandOver on without kho=on, as it "
            "shows no configuration",
            "Switch it on: --append kho=on",
        )
    return _torn(target) or Finding.passed(target.cmdline)


def _torn(target: Target) -> Finding | None:
    """Words that the running kernel does not have and the next one would not read as they were written."""
    torn = [word.text for word in target.words if word.fate is Fate.added and lines.torn(word.text)]
    if not torn:
        return None
    return Finding.warn(
        f"The next kernel ends a word at the byte 0xA0, which is within a character of: {join_names(torn, MAX_SHOWN)}",
        'Put the value between double quotes, as in root="LABEL=...", or use other characters.',
    )


RESULTS = {
    Effect.panic: CheckResult.fail,
    Effect.nothing: CheckResult.fail,
    Effect.files: CheckResult.fail,
    Effect.empty: CheckResult.warn,
    Effect.shown: CheckResult.passed,
}
"""How much each effect of a mismatch weighs."""


@_of_target
def formats(facts: Facts, target: Target, about: Kernel) -> Finding:
    """It reads what this kernel writes."""
    if (kernel := facts.probed.kernel) is None:
        return Finding.skipped("The running kernel has no KHO")
    writes = written(facts.kexec.calls, kernel.generation, about)
    found = understood(writes, about, target.booted_line)
    name = about.version or target.kernel.name
    notes = [
        *(f"only a module can read {one}, which the image does not show" for one in found.unread),
        *(f"{one} does not say its format, and is not judged" for one in writes.unjudged),
        *(f"not inspected: {one}" for one in found.not_inspected),
    ]
    evidence = "; ".join([found.why, *notes])
    if found.answer is Answer.unknown:
        warn = facts.config.policy.unknown_format == "warn"
        return Finding(
            CheckResult.warn if warn else CheckResult.fail,
            f"It cannot be told whether {name} takes the state over: {evidence}",
            'If you know that it does: policy.unknown_format = "warn" in /etc/kho/khod.toml',
        )
    if found.effect is not None:
        held = any(one.kept for one in facts.record.producers) or any(
            not one.incoming for one in facts.sighted.sessions
        )
        return _mismatch(found, f"{name} {found.effect.value}: {evidence}", held=held)
    if found.not_inspected:
        return Finding.warn(
            f"{name} reads what this kernel writes, as far as it was inspected: {evidence}",
            f"Put the running kernel's own image where it can be found: /boot/vmlinuz-{facts.kexec.release()}",
        )
    return Finding.passed(f"{name} reads what this kernel writes: {evidence}")


def _mismatch(found: Understood, evidence: str, *, held: bool) -> Finding:
    """Weigh it; `held` is whether a LUO session is there now whose files would be lost."""
    assert found.effect is not None, "asked before"
    if found.luo_off:
        judge = Finding.fail if held else Finding.warn
        return judge(evidence, "Add it: --append liveupdate=on")
    override = "off" if found.effect is Effect.panic else "warn"
    return Finding(
        RESULTS[found.effect],
        evidence,
        "Choose a kernel that reads the same formats, or reboot without keeping state; to jump all the same: "
        f'checks.formats = "{override}" in /etc/kho/khod.toml',
        panic=found.effect is Effect.panic,
    )


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
            f"{subject} is not signed, and this kernel loads only signed images: it would say ENODATA, or "
            "ELIBBAD of an image that is not a PE file",  # seen on 7.3.4, of one built without CONFIG_EFI_STUB
            "Use a signed image (Debian: linux-image-VERSION-amd64, not -unsigned), or sign it with a key this kernel "
            "trusts (sbsign), for which it must be built with CONFIG_EFI_STUB."
            + (" The unified image's own signature is nothing to kexec." if "UKI" in formats else ""),
        )
    if enforced is None:
        return Finding.warn(
            f"{subject} is not signed, and this kernel does not say whether it requires a signature",
            "Look for CONFIG_KEXEC_SIG_FORCE in its configuration.",
        )
    return Finding.passed(f"{subject} is not signed; this kernel does not require a signature")


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
    kernel = facts.probed.kernel
    if kernel is None or kernel.generation is not Generation.sysfs:
        return 0
    return len(facts.outgoing.root) if facts.outgoing and facts.observed.active else 0


def mib(size: int) -> str:
    """A size in MiB, so that a difference of a page shows."""
    return f"{size / 2**20:.3f}".rstrip("0").rstrip(".") + " MiB"
