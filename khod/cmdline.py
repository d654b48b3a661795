"""The next kernel's command line: what is kept of the running one, what is added, what no kernel takes."""

from khod.errors import UsageError

# What must not travel: the boot loader's own notes, and khod's marker of the previous run.
NOT_REUSED = ("BOOT_IMAGE=", "initrd=", "kexec_jump_back_entry=", "elfcorehdr=", "khod.run=")
MARKER = "khod.run="


def compose(running: str, given: str | None, append: str | None, run: str, limit: int) -> str:
    """Make the command line: `given`, or what is worth keeping of `running`; then `append`; then the marker.

    The marker `khod.run=ID` is how the kernel after the jump is told from one booted cold. `limit`
    is the longest the image takes, in bytes without the NUL. Raises UsageError.
    """
    base = " ".join(reusable(running)) if given is None else given
    line = " ".join(part for part in (base.strip(), (append or "").strip(), f"{MARKER}{run}") if part)
    for name, char in (("NUL", "\0"), ("newline", "\n")):
        if char in line:
            raise UsageError(
                f"The command line has a {name} at byte {line.index(char)}",
                where="--cmdline/--append",
                remedy="Remove it: a kernel command line is one line of text.",
            )
    try:
        length = len(line.encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The command line is no UTF-8 at character {error.start}",
            where="--cmdline/--append",
            remedy="Write it in UTF-8.",
        ) from None
    if length > limit:
        raise UsageError(
            f"The command line is {length} bytes, the image takes {limit}",
            where="--cmdline/--append",
            remedy="Shorten it.",
        )
    return line


def reusable(running: str) -> list[str]:
    """The words of the running command line that may travel."""
    return [word for word in running.split() if not word.startswith(NOT_REUSED)]


def marked(running: str, run: str) -> bool:
    """Tell whether the running kernel was started by the kexec of this run."""
    return f"{MARKER}{run}" in running.split()
