# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel's command line: what is kept of the running one, what is added, what no kernel takes."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from khod.errors import UsageError
from khod.kernel.next_arg import INIT, QUOTE, Arg, is_switched_on, kernel_args, kernel_words, parse_word
from khod.model import Fate, Word
from khod.text import printable, shorten

MAX_SHOWN = 80
"""Characters of a word that a message shows."""

NOT_REUSED = (
    "BOOT_IMAGE=",  # the boot loader's note of what it booted
    "initrd=",  # the EFI stub would load that file again
    "elfcorehdr=",  # where a crashed kernel's memory is described: for its crash kernel alone
    "disable_cpu_apicid=",  # kdump's, of the processor that crashed
    "kexec_jump_back_entry=",  # kexec's own, of the kernel before
    "khod.run=",  # this handover's mark, of the run before
)
"""Words of the running kernel's command line that do not travel, by how they begin."""

MARKER = "khod.run="

WORD = re.compile(r'(?:[^\t-\r "]|"[^"]*(?:"|\Z))+')
"""An operator's word: as the kernel's (`khod.kernel.next_arg`), but that ASCII white space alone ends it.

Where the kernel ends one in the middle of a character, `torn_words` says so; the line that is given stays as it is.
"""

DEVICE = re.compile(r"/dev/(dm-[0-9]+|(?:(?:cciss|ida|rd|etherd)/)?(?!root$)[a-z][a-z0-9._]*)")
"""A block device by the kernel's own name (also /dev/nfs, /dev/cifs and /dev/ram); few have a slash in it."""
MAX_DEVICE = 31
"""Characters of such a name that devt_from_devname() takes."""
NUMBERED = re.compile(r"[0-9]+:[0-9]+(?::[0-9]+:)?|[0-9a-fA-F]+")
"""A device number as devt_from_devnum() takes it: MAJOR:MINOR, or both in one hexadecimal number."""
NODEV = frozenset({"virtiofs", "9p"})
"""File systems of `rootfstype=` whose `root=` is a tag and no device (mount_nodev_root())."""

SHELLS = frozenset({"sh", "bash", "dash", "ash", "busybox", "zsh"})
"""What `init=` may name in place of an init, by its last part."""
REPAIR = frozenset({"emergency", "rescue", "single", "s", "S", "1", "-b", "-s"})
"""Words that have systemd start a shell and few units (kernel-command-line(7)), and no khod."""
REPAIR_UNITS = frozenset({"emergency.target", "rescue.target"})

OPTIONS = "`kernel.cmdline`, `kernel.append`, `kernel.remove`"
PROC = "/proc/cmdline"


def compose_cmdline(
    running: str,
    given: str | None,
    append: str | None,
    run: str,
    limit: int,
    remove: Sequence[str] = (),
    where: str = OPTIONS,
) -> str:
    """Make the command line: `given`, or what is worth keeping of `running`; less `remove`; then `append`; the marker.

    `remove` names parameters (`console` takes away each `console=...`) or whole words (`console=ttyS0`). The
    marker `khod.run=ID` is how the kernel after the jump is told from one booted cold. `limit` is the longest
    the image takes, in bytes without the NUL. Raises UsageError; also where `remove` names what is not there, which
    may be a mistyped word that would be booted with. `where` says whose line `given` is.
    """
    for text in (append or "", *remove):
        _check_text(text, OPTIONS)
    if given is None:
        where = PROC
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
    """Whether a name for --remove means this word; the kernel reads dashes in a parameter's name as underscores."""
    wanted, arg = parse_word(name), parse_word(word)
    return arg.is_parameter(wanted.param) and (wanted.value is None or wanted.value == arg.value)


def _check_removed(names: Sequence[str], words: list[str]) -> None:
    """Raise UsageError for a name that means none of the kernel's words."""
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
    """Raise UsageError where a kernel would cut the text off, or cannot be given it."""
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
    """Raise UsageError for a quote that is not closed: the kernel takes all that follows into that word."""
    if word.count(QUOTE) % 2:
        raise UsageError(
            f"The command line has a double quote without its end, in: {shorten(printable(word), MAX_SHOWN)}",
            where=where,
            remedy="Close it: all that follows would be one word."
            if where == OPTIONS
            else "Close it, or take the word away with `kernel.remove`, or give another line with `kernel.cmdline`.",
        )


def _split_init(words: list[str]) -> tuple[list[str], list[str]]:
    """The kernel's words, and init's."""
    at = next((at for at, word in enumerate(words) if parse_word(word) == Arg(INIT, None)), len(words))
    return words[:at], words[at + 1 :]


def reusable_words(running: str) -> list[str]:
    """The words of the running command line that may travel."""
    return [word for word in WORD.findall(running) if not _may_stay(parse_word(word))]


def _may_stay(arg: Arg) -> bool:
    return arg.value is not None and any(arg.is_parameter(name.removesuffix("=")) for name in NOT_REUSED)


def is_marked(running: str, run: str) -> bool:
    """Tell whether the running kernel was started by the kexec of this run."""
    return f"{MARKER}{run}" in kernel_words(running)


def torn_words(line: str) -> list[str]:
    """The operator's words that are more than one word to the kernel: it takes the byte 0xA0 for white space."""
    return [word for word in WORD.findall(line) if kernel_words(word) != [word]]


def run_mark(running: str) -> str:
    """Name the run whose kexec started the running kernel; "" where none says so."""
    return next((word.removeprefix(MARKER) for word in kernel_words(running) if word.startswith(MARKER)), "")


def init_path(line: str) -> str:
    """What the kernel runs first from its initrd, as a path in there: `rdinit=`, else `init`."""
    values = [arg.value for arg in kernel_args(line) if arg.param == "rdinit" and arg.value is not None]
    return values[-1].lstrip("/") if values else "init"


def root_value(line: str) -> str:
    """Where the root is, as `root=` has it: the last one counts, "" where there is none."""
    return _last_value(line, "root")


def mounts_root(line: str) -> bool:
    """Tell whether the kernel can mount its root without an initrd's programs.

    What parse_root_device(), mount_root() (init/do_mounts.c) and early_lookup_bdev() (block/early-lookup.c) resolve.
    UUID=, LABEL= and what lies below /dev/mapper or /dev/disk are names of udev's and of an initrd's.
    """
    name = root_value(line)
    if found := DEVICE.fullmatch(name):
        # A device mapper's device is there only where the kernel itself has set it up (drivers/md/dm-init.c).
        return len(found[1]) <= MAX_DEVICE and (
            not found[1].startswith("dm-") or bool(_last_value(line, "dm-mod.create"))
        )
    if NUMBERED.fullmatch(name) or name.startswith(("PARTUUID=", "PARTLABEL=", "mtd", "ubi")):
        return True
    return bool(name) and not NODEV.isdisjoint(_last_value(line, "rootfstype").split(","))


def _last_value(line: str, name: str) -> str:
    """The last value of a parameter, "" where it has none."""
    return next((arg.value for arg in reversed(list(kernel_args(line))) if arg.is_parameter(name) and arg.value), "")


def compare_cmdlines(running: str, new: str) -> list[Word]:
    """Put both lines side by side, word by word: the new one's in their order, then what is no longer there.

    What must not travel and the marker are no difference. `lost` says what a handover loses by what becomes of a word
    of the kernel's; init's words are nothing to it.
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
    """The words that may travel, each with whether it is init's: the same word means another thing there."""
    words = reusable_words(line)
    kernels = len(_split_init(words)[0])
    return [(word, at >= kernels) for at, word in enumerate(words)]


def describe_losses(words: Sequence[Word]) -> Iterator[str]:
    """What would be lost, a clause each."""
    return (word.lost for word in words if word.lost)


def turns_kho_off(words: Sequence[Word]) -> bool:
    """Tell whether the next kernel would come up with Kexec HandOver off, while the running one has it on."""
    return any(parse_word(word.text).is_parameter("kho") and word.lost for word in words)


def _describe_change(word: str, new: str) -> str:
    """What a word that is added changes for a handover; "" nothing."""
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
    """What a handover loses when this word is gone, in view of the new line; "" nothing."""
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
            # SIZE:ALIGN:NAME; the next kernel looks for the name, and takes it only with the same size and alignment.
            name = value.rpartition(":")[2]
            changed = any(text.rpartition(":")[2] == name for text in others)
            return f"the memory reserved as {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case "kho_scratch" | "kho_bootmem":
            return ""  # one name before Linux 7.4 and one since; a kernel reached by a handover gets its scratch by it
        case "trace_instance":
            name = re.split(r"[@^,]", value)[0]
            changed = any(re.split(r"[@^,]", text)[0] == name for text in others)
            return f"the trace buffer {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case _:
            return ""
