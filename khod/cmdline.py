"""The next kernel's command line: what is kept of the running one, what is added, what no kernel takes."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from khod.errors import UsageError
from khod.kernel.built import switched_on
from khod.model import Fate, Word

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
INIT = "--"
"""Words after this one are init's, not the kernel's (Documentation/admin-guide/kernel-parameters.rst)."""

WORD = re.compile(r'(?:[^\s"]|"[^"]*(?:"|$))+')
"""As next_arg() in lib/cmdline.c splits: double quotes keep white space together."""

OPTIONS = "--cmdline/--append/--remove"


def compose(
    running: str, given: str | None, append: str | None, run: str, limit: int, remove: Sequence[str] = ()
) -> str:
    """Make the command line: `given`, or what is worth keeping of `running`; less `remove`; then `append`; the marker.

    `remove` names parameters (`console` takes away each `console=...`) or whole words (`console=ttyS0`). The
    marker `khod.run=ID` is how the kernel after the jump is told from one booted cold. `limit` is the longest
    the image takes, in bytes without the NUL. Raises UsageError.
    """
    for text in (given or "", append or "", *remove):
        _one_line(text)
    base, init = _split(reusable(running) if given is None else WORD.findall(given))
    added, added_init = _split(WORD.findall(append or ""))
    kept = [word for word in base if not any(_names(name, word) for name in remove)]
    to_init = [*init, *added_init]
    line = " ".join([*kept, *added, f"{MARKER}{run}", *([INIT, *to_init] if to_init else [])])
    if (length := len(line.encode())) > limit:
        raise UsageError(
            f"The command line is {length} bytes, the image takes {limit}", where=OPTIONS, remedy="Shorten it."
        )
    return line


def _names(name: str, word: str) -> bool:
    """Whether a name for --remove means this word; the kernel reads dashes in a parameter's name as underscores."""
    parameter, _, value = word.partition("=")
    wanted, equals, text = name.partition("=")
    return _same(wanted, parameter) and (not equals or text == value)


def _same(one: str, other: str) -> bool:
    return one.replace("-", "_") == other.replace("-", "_")


def _one_line(text: str) -> None:
    """Raise UsageError where a kernel would cut the text off, or cannot be given it."""
    for name, char in (("NUL", "\0"), ("newline", "\n")):
        if char in text:
            raise UsageError(
                f"The command line has a {name} at character {text.index(char)}",
                where=OPTIONS,
                remedy="Remove it: a kernel command line is one line of text.",
            )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The command line is no UTF-8 at character {error.start}", where=OPTIONS, remedy="Write it in UTF-8."
        ) from None


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The kernel's words, and init's."""
    at = words.index(INIT) if INIT in words else len(words)
    return words[:at], words[at + 1 :]


def reusable(running: str) -> list[str]:
    """The words of the running command line that may travel."""
    return [word for word in WORD.findall(running) if not word.startswith(NOT_REUSED)]


def marked(running: str, run: str) -> bool:
    """Tell whether the running kernel was started by the kexec of this run."""
    return f"{MARKER}{run}" in WORD.findall(running)


def mark(running: str) -> str:
    """Name the run whose kexec started the running kernel; "" where none says so."""
    return next((word.removeprefix(MARKER) for word in WORD.findall(running) if word.startswith(MARKER)), "")


def init(line: str) -> str:
    """What the kernel runs first from its initrd, as a path in there: `rdinit=`, else `init`."""
    words = [word.partition("=")[2] for word in _split(WORD.findall(line))[0] if word.startswith("rdinit=")]
    return words[-1].strip('"').lstrip("/") if words else "init"


def has_root(line: str) -> bool:
    """Tell whether the kernel can go on without an initrd's init: it is told where its root is."""
    return any(word.startswith("root=") for word in _split(WORD.findall(line))[0])


def compare(running: str, new: str) -> list[Word]:
    """Put both lines side by side, word by word: the new one's in their order, then what is no longer there.

    What must not travel and the marker are no difference. `lost` says what a handover loses with a word.
    """
    old, now = Counter(reusable(running)), Counter(reusable(new))
    here = Counter(old)
    words = []
    for word in reusable(new):
        words.append(Word(word, Fate.kept if here[word] else Fate.added))
        here[word] -= 1
    return [*words, *(Word(word, Fate.removed, _lost(word, new)) for word in (old - now).elements())]


def losses(words: Sequence[Word]) -> Iterator[str]:
    """What would be lost, a clause each."""
    return (word.lost for word in words if word.lost)


def off(words: Sequence[Word]) -> bool:
    """Tell whether the next kernel would come up with Kexec HandOver off, while the running one has it on."""
    return any(_same(word.text.partition("=")[0], "kho") and word.lost for word in words)


def _lost(word: str, new: str) -> str:
    """What a handover loses when this word is gone, in view of the new line; "" nothing."""
    parameter, _, value = word.partition("=")
    others = [text for name, _, text in (other.partition("=") for other in WORD.findall(new)) if _same(name, parameter)]
    match parameter.replace("-", "_"):
        case "kho" if switched_on(word, "kho") and not switched_on(new, "kho"):
            return f"without {word} the next kernel takes nothing over"
        case "liveupdate" if switched_on(word, "liveupdate") and not switched_on(new, "liveupdate"):
            return f"without {word} no producer gets its files back"
        case "reserve_mem":
            # SIZE:ALIGN:NAME; the next kernel looks for the name, and takes it only with the same size and alignment.
            name = value.rpartition(":")[2]
            changed = any(text.rpartition(":")[2] == name for text in others)
            return f"the memory reserved as {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case "trace_instance":
            name = re.split(r"[@^,]", value)[0]
            changed = any(re.split(r"[@^,]", text)[0] == name for text in others)
            return f"the trace buffer {name} is lost: {word} is {'changed' if changed else 'gone'}"
        case _:
            return ""
