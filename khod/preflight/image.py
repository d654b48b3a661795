# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the next kernel: whether this host can load it, and whether it would take over the state."""

import mmap
import re
from collections.abc import Callable

from khod.images.accepted import INITRD
from khod.images.kernel import KernelImageInfo, Signature
from khod.kernel import cmdline as lines
from khod.kernel import host
from khod.kernel.formats import read_formats
from khod.kernel.kconfig import ignores_line, is_not_set, is_set
from khod.kernel.next_arg import boolean_value, kernel_args, parse_word
from khod.kernel.traits import traits_of
from khod.model import CheckResult, Fate
from khod.preflight.facts import CheckFinding, Facts, format_regions
from khod.preflight.kernel import signatures_enforced
from khod.target.compatibility import Compatibility, Effect, FormatMatch, check_compatibility, next_kho
from khod.target.placement import NoRoom, list_segments, place_segments
from khod.target.target import Target
from khod.text import join_names, printable, shorten

MAX_SHOWN = 3
MAX_LINE_SHOWN = 200
"""The number of characters shown of the next kernel's own command line."""
UNREADABLE = "The image could not be looked at: see the check `image`"


def _of_target(
    judge: Callable[[Facts, Target, KernelImageInfo], CheckFinding],
) -> Callable[[Facts], CheckFinding | None]:
    """Make a check of an image that could be read; without one, the check is left out or skipped."""

    def check(facts: Facts) -> CheckFinding | None:
        if facts.target is None:
            return None
        if facts.target.apart is None:
            return CheckFinding.skip_with(UNREADABLE)
        return judge(facts, facts.target, facts.target.apart.about)

    return check


def check_image(facts: Facts) -> CheckFinding | None:
    """The image is complete, and a kernel that this machine's loader accepts."""
    target = facts.target
    if target is None:
        return None
    if error := target.wrong.get("image"):
        return CheckFinding.from_error(error)
    assert target.apart is not None, "either taken apart or wrong"
    about = target.apart.about
    if not about.five_level and host.five_level_paging(facts.kexec.calls):
        return CheckFinding.fail_with(
            f"{target.kernel.name} cannot be started with five levels of page tables, which this kernel runs with: "
            "the loader would say ENOEXEC",  # bzImage64_probe(): XLF_5LEVEL
            "Give `kernel.image` a kernel built with CONFIG_X86_5LEVEL=y, or boot this one with no5lvl.",
        )
    return CheckFinding.pass_with(
        f"{target.kernel.name}: {' with '.join(target.apart.formats)}, {about.version or 'no version'}, {about.arch}, "
        f"{about.size / 2**20:.1f} MiB, {about.memory / 2**20:.1f} MiB in memory"
    )


def check_initrd(facts: Facts) -> CheckFinding | None:
    """The initrd is an archive that the kernel unpacks, with a program to start in it."""
    target = facts.target
    if target is None:
        return None
    if error := target.wrong.get("initrd"):
        return CheckFinding.from_error(error)
    about = target.apart.about if target.apart else None
    if target.initrd is None or not any(one.formats for one in target.initrds):
        return _no_initrd(target, about)
    if wrong := _not_built_for(target, about):
        return wrong
    return _judge_archives(target, about)


def _no_initrd(target: Target, about: KernelImageInfo | None) -> CheckFinding:
    """Check a next kernel without an archive, or with nothing but a boot configuration."""
    what = "No initrd" if target.initrd is None else f"{target.initrd.name} holds a boot configuration and no archive"
    if _built_in_initramfs(about):
        return CheckFinding.pass_with(f"{what}; the image has an initramfs built in (CONFIG_INITRAMFS_SOURCE)")
    if not (no_root := _no_root(target)):
        return CheckFinding.pass_with(
            f"{what}; the kernel mounts root={printable(lines.root_value(target.booted_line))} itself"
        )
    return _without_root(
        target,
        about,
        f"{what}, and {no_root}",
        "Give `kernel.initrds`, or the root with `kernel.append=root=...`",
    )


def _not_built_for(target: Target, about: KernelImageInfo | None) -> CheckFinding | None:
    """Check that the next kernel has the options that the initrd needs, if the image shows its configuration."""
    if about is None or about.config is None:
        return None
    wanted = {INITRD, *(option for one in target.initrds for option in one.needs)}
    missing = sorted(option for option in wanted if is_not_set(about.config, option))
    if not missing:
        return None
    return CheckFinding.fail_with(
        f"{about.version or target.kernel.name} was built without {join_names(missing, MAX_SHOWN)}: it would not "
        f"unpack {target.initrd.name if target.initrd else 'the initrd'}",
        "Pack the initrd as that kernel unpacks it (`COMPRESS=` in initramfs.conf, `compress=` in dracut.conf), or "
        "choose another kernel.",
    )


def _judge_archives(target: Target, about: KernelImageInfo | None) -> CheckFinding:
    """Check the contents of the archives: a program to start, and modules for this kernel."""
    assert target.initrd is not None, "asked before"
    files, unpacked = sum(one.files for one in target.initrds), sum(one.unpacked for one in target.initrds)
    what = f"{target.initrd.name}: {files} {'file' if files == 1 else 'files'}, {unpacked / 2**20:.1f} MiB unpacked"
    if any(one.bootconfig for one in target.initrds):
        what += ", a boot configuration at its end, whose words were not inspected"
    init, found = lines.init_path(target.booted_line), any(one.init for one in target.initrds)
    if opaque := next((one.opaque for one in target.initrds if one.opaque), ""):
        return CheckFinding.warn_with(
            f"{what}; not inspected: {opaque}{f'; /{init} is in what was' if found else ''}",
            "Pack it with another compression (zstd, xz --check=crc32, gzip), so that khod can look into it.",
        )
    modules, version = {tree for one in target.initrds for tree in one.modules}, about.version if about else ""
    if modules and version and version not in modules:
        return CheckFinding.warn_with(
            f"{what}, with modules for {join_names(sorted(modules), MAX_SHOWN)}; the image is {version}, and loads "
            "none of them",
            f"Give the initrd that was made for {version}, for instance with: khoctl check `kernel={version}`",
        )
    if found:
        needed = sorted(option for one in target.initrds for option in one.needs)
        unseen = f"; not inspected: whether the kernel has {join_names(needed, MAX_SHOWN)}, it shows no configuration"
        return CheckFinding.pass_with(
            f"{what}, /{init} is there{unseen if needed and (about is None or about.config is None) else ''}"
        )
    if _built_in_initramfs(about):
        return CheckFinding.pass_with(f"{what}, no /{init} in it; the image has an initramfs built in")
    if not (no_root := _no_root(target)):
        return CheckFinding.warn_with(
            f"{what}, and no /{init} in it: the kernel mounts root= itself",
            "Be sure that the drivers of the root are built in.",
        )
    return _without_root(
        target,
        about,
        f"{what}, no /{init} in it, and {no_root}",
        "Give the initrd of this kernel, or the root with `kernel.append=root=...`",
    )


def _no_root(target: Target) -> str:
    """Return why the kernel cannot find its root itself, or "" if it can."""
    if lines.mounts_root(target.booted_line):
        return ""
    root = lines.root_value(target.booted_line)
    return f"only an initrd's programs find root={printable(root)}" if root else "no root= on the command line"


def _without_root(target: Target, about: KernelImageInfo | None, what: str, remedy: str) -> CheckFinding:
    """Return the finding for a kernel whose command line gives no root.

    It fails, unless a boot configuration may add words to the command line.
    """
    if any(one.bootconfig for one in target.initrds) and _reads_bootconfig(target, about):
        return CheckFinding.warn_with(
            f"{what}; not inspected: the boot configuration, whose `kernel` keys the next kernel adds to its command "
            "line",
            "Be sure that it names the root, and what the kernel sets it up with (dm-mod.create).",
        )
    return CheckFinding.fail_with(f"{what}: the next kernel would panic", remedy)


def _reads_bootconfig(target: Target, about: KernelImageInfo | None) -> bool:
    """Whether the next kernel uses the boot configuration in its initrd: setup_boot_config() in init/main.c."""
    config = about.config if about and about.config else ""
    asked = any(arg.param == "bootconfig" for arg in kernel_args(target.booted_line))
    return (asked or is_set(config, "CONFIG_BOOT_CONFIG_FORCE")) and not is_not_set(config, "CONFIG_BOOT_CONFIG")


def _built_in_initramfs(about: KernelImageInfo | None) -> bool:
    """Whether the image's configuration names a built-in initramfs, beyond the default one with /dev and /root."""
    config = about.config if about else None
    return config is not None and re.search(r'^CONFIG_INITRAMFS_SOURCE="[^"]+"$', config, re.MULTILINE) is not None


def check_cmdline(facts: Facts) -> CheckFinding | None:
    """The command line has everything that KHO and the producers need."""
    if (target := facts.target) is None:
        return None
    about, kernel = target.apart.about if target.apart else None, facts.probed.kernel
    mainline = kernel is not None and traits_of(kernel.generation).has_parameter
    is_on = next_kho(about, target.booted_line) if about and mainline else None
    if about is not None and about.config is not None and ignores_line(about.config):
        return CheckFinding(
            CheckResult.fail if is_on is False else CheckResult.warn,
            f"{about.version or target.kernel.name} boots only with the command line it was built with: "
            f"{shorten(printable(target.booted_line), MAX_LINE_SHOWN) or 'an empty one'}",
            "Choose a kernel built without CONFIG_CMDLINE_OVERRIDE and CONFIG_CMDLINE_FORCE.",
        )
    lost = [
        word.lost for word in target.words if word.lost and not (is_on and parse_word(word.text).is_parameter("kho"))
    ]
    fates = {word.fate for word in target.words if word.lost}
    remedy = "Add it again with `kernel.append`, or reuse the running line: `kernel.reuse_cmdline`"
    if Fate.added in fates:
        others = f". {remedy}" if Fate.removed in fates else ""
        remedy = f"Leave out what you added, unless you mean it{others}"
    if is_on is False and not lines.turns_kho_off(target.words):
        lost.append(
            "the next kernel has Kexec HandOver off: its command line and its configuration do not switch it on"
        )
        remedy = "Switch it on: `kernel.append=kho=on`"
    if lost:
        off = is_on is False or (is_on is None and lines.turns_kho_off(target.words))
        return CheckFinding(CheckResult.fail if off else CheckResult.warn, "; ".join(lost), remedy)
    if is_on is None and mainline and about is not None and boolean_value(target.booted_line, "kho") is None:
        return CheckFinding.warn_with(
            f"{target.cmdline}; not inspected: whether the next kernel has Kexec HandOver on without kho=on, as it "
            "shows no configuration",
            "Switch it on: `kernel.append=kho=on`",
        )
    return _find_torn(target) or CheckFinding.pass_with(target.cmdline)


def _find_torn(target: Target) -> CheckFinding | None:
    """Warn about new words that the next kernel would not read as they were written."""
    torn = [word.text for word in target.words if word.fate is Fate.added and lines.torn_words(word.text)]
    if not torn:
        return None
    return CheckFinding.warn_with(
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
"""The result for each effect of a mismatch."""


@_of_target
def check_formats(facts: Facts, target: Target, about: KernelImageInfo) -> CheckFinding:
    """The next kernel reads the formats that this kernel writes."""
    if (kernel := facts.probed.kernel) is None:
        return CheckFinding.skip_with("The running kernel has no KHO")
    writes = read_formats(facts.kexec.calls, kernel.generation, about)
    found = check_compatibility(writes, about, target.booted_line)
    name = about.version or target.kernel.name
    notes = [
        *(f"only a module can read {one}, which the image does not show" for one in found.unread),
        *(f"{one} does not say its format, and is not judged" for one in writes.unjudged),
        *(f"not inspected: {one}" for one in found.not_inspected),
    ]
    evidence = "; ".join([found.why, *notes])
    if found.answer is FormatMatch.unknown:
        warn = facts.config.policy.unknown_format == "warn"
        return CheckFinding(
            CheckResult.warn if warn else CheckResult.fail,
            f"It cannot be told whether {name} takes the state over: {evidence}",
            'If you know that it does: policy.unknown_format = "warn" in /etc/kho/khod.toml',
        )
    if found.effect is not None:
        held = any(one.kept for one in facts.record.producers) or any(
            not one.incoming for one in facts.sighted.sessions
        )
        return _weigh_mismatch(found, f"{name} {found.effect.value}: {evidence}", held=held)
    if found.not_inspected:
        return CheckFinding.warn_with(
            f"{name} reads what this kernel writes, as far as it was inspected: {evidence}",
            f"Put the running kernel's own image where it can be found: /boot/vmlinuz-{facts.kexec.kernel_release()}",
        )
    return CheckFinding.pass_with(f"{name} reads what this kernel writes: {evidence}")


def _weigh_mismatch(found: Compatibility, evidence: str, *, held: bool) -> CheckFinding:
    """Return the finding for a mismatch; `held` tells whether a LUO session exists whose files would be lost."""
    assert found.effect is not None, "asked before"
    if found.luo_off:
        judge = CheckFinding.fail_with if held else CheckFinding.warn_with
        return judge(evidence, "Add it: `kernel.append=liveupdate=on`")
    override = "off" if found.effect is Effect.panic else "warn"
    return CheckFinding(
        RESULTS[found.effect],
        evidence,
        "Choose a kernel that reads the same formats, or reboot without keeping state; to jump all the same: "
        f'checks.formats = "{override}" in /etc/kho/khod.toml',
        panic=found.effect is Effect.panic,
    )


@_of_target
def check_signature(facts: Facts, target: Target, about: KernelImageInfo) -> CheckFinding:
    """The image is signed if the loader requires it; only the loader checks whether the signature is valid."""
    assert target.apart is not None, "what _of_target() has looked at"
    enforced, formats = signatures_enforced(facts), target.apart.formats
    subject = target.kernel.name if len(formats) == 1 else f"The kernel in {target.kernel.name}"
    if about.signature is not Signature.none:
        return CheckFinding.pass_with(f"{subject} has an embedded signature ({about.signature.value})")
    if enforced:
        return CheckFinding.fail_with(
            f"{subject} has no embedded signature, and this kernel loads only signed images: it would say ENODATA, or "
            "ELIBBAD of an image that is not a PE file",  # seen on 7.3.4, for an image built without CONFIG_EFI_STUB
            "Use a signed image (Debian: linux-image-VERSION-amd64, not -unsigned), or sign it with a key this kernel "
            "trusts (sbsign), for which it must be built with CONFIG_EFI_STUB."
            + (" The unified image's own signature is nothing to kexec." if "UKI" in formats else ""),
        )
    if enforced is None:
        return CheckFinding.warn_with(
            f"{subject} has no embedded signature, and this kernel does not say whether it requires one",
            "Look for CONFIG_KEXEC_SIG_FORCE in its configuration.",
        )
    return CheckFinding.pass_with(f"{subject} has no embedded signature; this kernel does not require one")


@_of_target
def check_fit(facts: Facts, target: Target, about: KernelImageInfo) -> CheckFinding:
    """The kernel, the initrd and the loader's own segments fit into scratch, region by region."""
    kernel = facts.probed.kernel
    if kernel is None:
        return CheckFinding.skip_with("The running kernel has no KHO, and no scratch")
    scratch, initrd_size = kernel.scratch_regions(), target.initrd.size if target.initrd else 0
    line = len(target.cmdline.encode()) + 1
    wanted = list_segments(about, initrd_size, line, kernel.generation, len(scratch), tree_size(facts))
    if wanted is None:
        return CheckFinding.skip_with(f"How the loader of {about.arch} places its segments is not known here")
    if wrong := _find_contradiction(about):
        return wrong
    found = place_segments(wanted, scratch)
    if isinstance(found, NoRoom):
        above = about.pref_address if found.segment.name == "kernel" else 0
        return CheckFinding.fail_with(
            f"The {found.segment.name} takes {format_mib(found.segment.size)} and the largest hole left in scratch"
            f"{f' from {above:#x} on, the pref_address in its header,' if above else ''} is {format_mib(found.hole)}: "
            f"{format_regions(scratch)}; the kernel would say EADDRNOTAVAIL",
            f"Boot with a larger {kernel.scratch_parameter}, or use a smaller initrd.",
        )
    at = next(one.at for one in found if one.segment.name == "kernel")
    if not about.relocatable and about.pref_address not in (0, at):
        return CheckFinding.fail_with(
            f"The image is not relocatable: it would be loaded at {at:#x}, and move itself to {about.pref_address:#x}, "
            "over what lies there and is handed over",
            "Use a kernel built with CONFIG_RELOCATABLE=y.",
        )
    total = sum(segment.size for segment in wanted)
    return CheckFinding.pass_with(
        f"Kernel ({format_mib(about.memory)}), initrd ({format_mib(initrd_size)}) and what the loader adds "
        f"({format_mib(total)} in all) fit into scratch: {format_regions(scratch)}"
    )


def _find_contradiction(about: KernelImageInfo) -> CheckFinding | None:
    """Check the header's sizes as sanity_check_segment_list() in kernel/kexec_core.c does, which returns EINVAL."""
    loaded, room = about.size - about.setup_size, -(-about.memory // mmap.PAGESIZE) * mmap.PAGESIZE
    if about.format != "bzImage" or loaded <= room:
        return None
    return CheckFinding.fail_with(
        f"The image is damaged: its header wants {format_mib(room)} in memory (init_size), "
        f"and {format_mib(loaded)} go there",
        "Copy the image again from its package.",
    )


def tree_size(facts: Facts) -> int:
    """Return the bytes of the tree that v3 copies into the image, 0 if that is not known."""
    kernel = facts.probed.kernel
    if kernel is None or not traits_of(kernel.generation).copies_tree:
        return 0
    return len(facts.outgoing.root) if facts.outgoing and facts.observed.active else 0


def format_mib(size: int) -> str:
    """Format a size in MiB, precisely enough to show a difference of one page."""
    return f"{size / 2**20:.3f}".rstrip("0").rstrip(".") + " MiB"
