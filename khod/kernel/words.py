# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of a kernel command line, as next_arg() (lib/cmdline.c) ends them.

The kernel reads bytes, and its isspace() decides what separates words: _ctype in lib/ctype.c marks the bytes 9 to 13,
32 and 160 as `_S`. The table is Latin-1's, where 160 is the no-break space. In UTF-8, 0xA0 is the last byte of U+00A0
and of every character whose code ends in 0x20 (à is C3 A0, † is E2 80 A0). The kernel ends a word in the middle of
these, unless they are between double quotes. 0x85 is not a space to it, nor is any other byte from 0x80 on.
"""

import re

WORD = re.compile(rb'(?:[^\t-\r \xa0"]|"[^"]*(?:"|\Z))+')
"""What one call of next_arg() reads: double quotes keep white space together, an open one extends to the end."""


def kernel_words(line: str) -> list[str]:
    """Split a line into words as the kernel does, with their quotes; init's words are included."""
    return [word.decode(errors="surrogateescape") for word in WORD.findall(line_bytes(line))]


def line_bytes(line: str) -> bytes:
    """Return the bytes of a line, including those that were not UTF-8."""
    try:
        return line.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a surrogate that represents no byte
        return line.encode(errors="replace")
