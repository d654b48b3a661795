# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mark of a handover on the command line of the kernel that its kexec starts."""

from khod.kernel.words import kernel_words

MARKER = "khod.run="


def is_marked(running: str, run: str) -> bool:
    """Whether the running kernel was started by the kexec of this run."""
    return f"{MARKER}{run}" in kernel_words(running)


def run_mark(running: str) -> str:
    """Return the run whose kexec started the running kernel, or "" without a mark."""
    return next((word.removeprefix(MARKER) for word in kernel_words(running) if word.startswith(MARKER)), "")
