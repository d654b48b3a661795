"""The next kernel's command line: what is kept of the running one, what is added, what no kernel takes."""

import re

from khod.errors import UsageError

# What must not travel: the boot loader's own notes, and khod's marker of the previous run.
NOT_REUSED = ("BOOT_IMAGE=", "initrd=", "kexec_jump_back_entry=", "elfcorehdr=", "khod.run=")
MARKER = "khod.run="
INIT = "--"
"""Words after this one are init's, not the kernel's (Documentation/admin-guide/kernel-parameters.rst)."""

WORD = re.compile(r'(?:[^\s"]|"[^"]*(?:"|$))+')
"""As next_arg() in lib/cmdline.c splits: double quotes keep white space together."""


def compose(running: str, given: str | None, append: str | None, run: str, limit: int) -> str:
    """Make the command line: `given`, or what is worth keeping of `running`; then `append`; then the marker.

    The marker `khod.run=ID` is how the kernel after the jump is told from one booted cold. `limit`
    is the longest the image takes, in bytes without the NUL. Raises UsageError.
    """
    for text in (given or "", append or ""):
        _one_line(text)
    base, init = _split(reusable(running) if given is None else WORD.findall(given))
    added, added_init = _split(WORD.findall(append or ""))
    to_init = [*init, *added_init]
    line = " ".join([*base, *added, f"{MARKER}{run}", *([INIT, *to_init] if to_init else [])])
    if (length := len(line.encode())) > limit:
        raise UsageError(
            f"The command line is {length} bytes, the image takes {limit}",
            where="--cmdline/--append",
            remedy="Shorten it.",
        )
    return line


def _one_line(text: str) -> None:
    """Raise UsageError where a kernel would cut the text off, or cannot be given it."""
    for name, char in (("NUL", "\0"), ("newline", "\n")):
        if char in text:
            raise UsageError(
                f"The command line has a {name} at character {text.index(char)}",
                where="--cmdline/--append",
                remedy="Remove it: a kernel command line is one line of text.",
            )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The command line is no UTF-8 at character {error.start}",
            where="--cmdline/--append",
            remedy="Write it in UTF-8.",
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
