# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel's command line: what is kept of the running one, what is added, and what no kernel accepts."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from khod.abi.proc import CMDLINE
from khod.errors import UsageError
from khod.kernel.mark import MARKER
from khod.kernel.next_arg import INIT, QUOTE, Arg, is_switched_on, kernel_args, parse_word
from khod.kernel.words import kernel_words
from khod.model import Fate, Word
from khod.text import printable, shorten

MAX_SHOWN = 80
"""The number of characters of a word that a message shows."""

NOT_REUSED = (
    "BOOT_IMAGE=",  # the boot loader's note of what it booted
    "initrd=",  # the EFI stub would load that file again
    "elfcorehdr=",  # where the memory of a crashed kernel is described, only for its crash kernel
    "disable_cpu_apicid=",  # kdump's: the processor that crashed
    "kexec_jump_back_entry=",  # kexec's own: the kernel before
    "khod.run=",  # the mark of the handover before
)
"""Words of the running kernel's command line that must not be reused, by their beginning."""

WORD = re.compile(r'(?:[^\t-\r "]|"[^"]*(?:"|\Z))+')
"""An operator's word: like the kernel's (`khod.kernel.next_arg`), but only ASCII white space ends it.

If the kernel ends one in the middle of a character, `torn_words` reports it; the given line is not changed.
"""

DEVICE = re.compile(r"/dev/(dm-[0-9]+|(?:(?:cciss|ida|rd|etherd)/)?(?!root$)[a-z][a-z0-9._]*)")
"""A block device by the kernel's own name (also /dev/nfs, /dev/cifs and /dev/ram); few have a slash in it."""
MAX_DEVICE = 31
"""The number of characters of such a name that devt_from_devname() accepts."""
NUMBERED = re.compile(r"[0-9]+:[0-9]+(?::[0-9]+:)?|[0-9a-fA-F]+")
"""A device number as devt_from_devnum() accepts it: MAJOR:MINOR, or both in one hexadecimal number."""
NODEV = frozenset({"virtiofs", "9p"})
"""File systems of `rootfstype=` whose `root=` is a tag instead of a device (mount_nodev_root())."""

SHELLS = frozenset({"sh", "bash", "dash", "ash", "busybox", "zsh"})
"""Shells that `init=` may name instead of an init, by the last part of the path."""
REPAIR = frozenset({"emergency", "rescue", "single", "s", "S", "1", "-b", "-s"})
"""Words with which systemd starts a shell and few units (kernel-command-line(7)), and not khod."""
REPAIR_UNITS = frozenset({"emergency.target", "rescue.target"})

OPTIONS = "`kernel.cmdline`, `kernel.append`, `kernel.remove`"


def compose_cmdline(
    running: str,
    given: str | None,
    append: str | None,
    run: str,
    limit: int,
    remove: Sequence[str] = (),
    where: str = OPTIONS,
) -> str:
    """Compose the command line: `given`, or what is reused of `running`; less `remove`; then `append`; then the mark.

    `remove` names parameters (`console` removes each `console=...`) or whole words (`console=ttyS0`). The mark
    `khod.run=ID` tells a kernel reached by the jump from one that booted cold. `limit` is the longest line that the
    image accepts, in bytes without the NUL. `where` says whose line `given` is. Raises UsageError; also if `remove`
    names a word that is not there, because a mistyped word would otherwise stay on the line.
    """
    for text in (append or "", *remove):
        _check_text(text, OPTIONS)
    if given is None:
        where = CMDLINE
    _check_text(running.replace("\n", " ") if given is None else given, where)
    words = WORD.findall(running if given is None else given)
    _check_removed(remove, words)
    base, init = _split_init([word for word in words if given is not None or not _may_stay(parse_word(word))])
    added, added_init = _split_init(WORD.findall(append or ""))
    kept = [word for word in base if not any(_names_word(name, word) for name in remove)]
    to_init = [*init, *added_init]
    for word in (*kept, *added, *to_init):
        _check_quotes(word, OPTIONS if word in added or word in added_init else where)
    line = " ".join([*kept, *added, f"{MARKER}{run}", *([INIT, *to_init] if to_init else [])])
    if (length := len(line.encode())) > limit:
        raise UsageError(
            f"The command line is {length} bytes, the image takes {limit}", where=OPTIONS, remedy="Shorten it."
        )
    return line


def _names_word(name: str, word: str) -> bool:
    """Whether a name in `remove` means this word; the kernel reads dashes in a parameter's name as underscores."""
    wanted, arg = parse_word(name), parse_word(word)
    return arg.is_parameter(wanted.param) and (wanted.value is None or wanted.value == arg.value)


def _check_removed(names: Sequence[str], words: list[str]) -> None:
    """Raise UsageError for a name that matches none of the kernel's words."""
    kernels, init = _split_init(words)
    for name in names:
        if any(_names_word(name, word) for word in kernels):
            continue
        of_init = any(_names_word(name, word) for word in init)
        shown = shorten(printable(name), MAX_SHOWN)
        raise UsageError(
            f"{shown} is not on the command line" + (f", but behind {INIT}, where words are init's" if of_init else ""),
            where="`kernel.remove`",
            remedy="Name a parameter or a whole word of it, or leave `kernel.remove` out.",
        )


def _check_text(text: str, where: str) -> None:
    """Raise UsageError if a kernel would cut the text off, or cannot be given it."""
    for name, char in (("NUL", "\0"), ("newline", "\n")):
        if char in text:
            raise UsageError(
                f"The command line has a {name} at character {text.index(char)}",
                where=where,
                remedy="Remove it: a kernel command line is one line of text.",
            )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The command line is not UTF-8 at character {error.start}",
            where=where,
            remedy="Write it in UTF-8." if where == OPTIONS else "Give a command line in UTF-8 with `kernel.cmdline`.",
        ) from None


def _check_quotes(word: str, where: str) -> None:
    """Raise UsageError for a quote that is not closed: the kernel reads all that follows as part of that word."""
    if word.count(QUOTE) % 2:
        raise UsageError(
            f"The command line has a double quote without its end, in: {shorten(printable(word), MAX_SHOWN)}",
            where=where,
            remedy="Close it: all that follows would be one word."
            if where == OPTIONS
            else "Close it, or take the word away with `kernel.remove`, or give another line with `kernel.cmdline`.",
        )


def _split_init(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the kernel's words, and those of init."""
    at = next((at for at, word in enumerate(words) if parse_word(word) == Arg(INIT, None)), len(words))
    return words[:at], words[at + 1 :]


def reusable_words(running: str) -> list[str]:
    """Return the words of the running command line that may be reused."""
    return [word for word in WORD.findall(running) if not _may_stay(parse_word(word))]


def _may_stay(arg: Arg) -> bool:
    return arg.value is not None and any(arg.is_parameter(name.removesuffix("=")) for name in NOT_REUSED)


def torn_words(line: str) -> list[str]:
    """Return the operator's words that are several words to the kernel, which reads the byte 0xA0 as white space."""
    return [word for word in WORD.findall(line) if kernel_words(word) != [word]]


def init_path(line: str) -> str:
    """Return the path in the initrd of what the kernel runs first: `rdinit=`, else `init`."""
    values = [arg.value for arg in kernel_args(line) if arg.param == "rdinit" and arg.value is not None]
    return values[-1].lstrip("/") if values else "init"


def root_value(line: str) -> str:
    """Return the last value of `root=`, or "" if there is none."""
    return _last_value(line, "root")


def mounts_root(line: str) -> bool:
    """Whether the kernel can mount its root without programs of an initrd.

    The rules are those of parse_root_device(), mount_root() (init/do_mounts.c) and early_lookup_bdev()
    (block/early-lookup.c). UUID=, LABEL= and paths below /dev/mapper or /dev/disk are names that udev and an initrd
    resolve.
    """
    name = root_value(line)
    if found := DEVICE.fullmatch(name):
        # A device of the device mapper exists only if the kernel itself has set it up (drivers/md/dm-init.c).
        return len(found[1]) <= MAX_DEVICE and (
            not found[1].startswith("dm-") or bool(_last_value(line, "dm-mod.create"))
        )
    if NUMBERED.fullmatch(name) or name.startswith(("PARTUUID=", "PARTLABEL=", "mtd", "ubi")):
        return True
    return bool(name) and not NODEV.isdisjoint(_last_value(line, "rootfstype").split(","))


def _last_value(line: str, name: str) -> str:
    """Return the last value of a parameter, or "" if it has none."""
    return next((arg.value for arg in reversed(list(kernel_args(line))) if arg.is_parameter(name) and arg.value), "")


def compare_cmdlines(running: str, new: str) -> list[Word]:
    """Compare both lines word by word: the new line's words in their order, then the removed ones.

    Words that must not be reused, and the mark, are not compared. `lost` says what a handover loses by the change of
    one of the kernel's words; words of init do not matter to it.
    """
    old, now = Counter(_placed_words(running)), Counter(_placed_words(new))
    left = Counter(old)
    words = []
    for placed in _placed_words(new):
        word, is_init = placed
        kept = left[placed] > 0
        words.append(
            Word(word, Fate.kept) if kept else Word(word, Fate.added, "" if is_init else _describe_change(word, new))
        )
        left[placed] -= 1
    gone = (old - now).elements()
    return [*words, *(Word(word, Fate.removed, "" if is_init else _describe_loss(word, new)) for word, is_init in gone)]


def _placed_words(line: str) -> list[tuple[str, bool]]:
    """Return the words that may be reused, each with whether it is init's: the same word has another meaning there."""
    words = reusable_words(line)
    kernels = len(_split_init(words)[0])
    return [(word, at >= kernels) for at, word in enumerate(words)]


def describe_losses(words: Sequence[Word]) -> Iterator[str]:
    """Yield what would be lost, one clause for each word."""
    return (word.lost for word in words if word.lost)


def turns_kho_off(words: Sequence[Word]) -> bool:
    """Whether the next kernel would start with Kexec HandOver off, while the running one has it on."""
    return any(parse_word(word.text).is_parameter("kho") and word.lost for word in words)


def _describe_change(word: str, new: str) -> str:
    """Describe what an added word changes for a handover; "" for nothing."""
    arg = parse_word(word)
    value = arg.value or ""
    roots = [other.value or "" for other in kernel_args(new) if other.is_parameter("root")]
    if arg.is_parameter("root") and len(roots) > 1 and roots[-1] == value:
        return f"root={roots[-2]} no longer counts: the last root= does"
    shell = arg.is_parameter("init") and value.rpartition("/")[2] in SHELLS
    if shell or word in REPAIR or (arg.is_parameter("systemd.unit") and value in REPAIR_UNITS):
        return f"with {word} khod does not start in the next kernel: nobody takes its state back"
    return ""


def _describe_loss(word: str, new: str) -> str:
    """Describe what a handover loses without this word, given the new line; "" for nothing."""
    arg = parse_word(word)
    value = arg.value or ""
    others = [other.value or "" for other in kernel_args(new) if other.is_parameter(arg.param)]
    match arg.param.replace("-", "_"):
        case "root" if not root_value(new):
            return f"without {word} the next kernel, or its initrd, must find the root by itself"
        case "kho" if is_switched_on(word, "kho") and not is_switched_on(new, "kho"):
            return f"without {word} the next kernel takes nothing over"
        case "liveupdate" if is_switched_on(word, "liveupdate") and not is_switched_on(new, "liveupdate"):
            return f"without {word} no producer gets its files back"
        case "reserve_mem":
            # SIZE:ALIGN:NAME; the next kernel looks for the name, and accepts it only with the same size and alignment.
            name = value.rpartition(":")[2]
            changed = any(text.rpartition(":")[2] == name for text in others)
            return f"the memory reserved as {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case "kho_scratch" | "kho_bootmem":
            return ""  # the name before Linux 7.4, and since; a kernel reached by a handover gets its scratch from that
        case "trace_instance":
            name = re.split(r"[@^,]", value)[0]
            changed = any(re.split(r"[@^,]", text)[0] == name for text in others)
            return f"the trace buffer {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case _:
            return ""
