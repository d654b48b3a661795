# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cases that are everything a case must not be: what finds such ones is itself held to finding them."""

import os
import signal

from khod.errors import MalformedTree
from tests.fuzz.spoken import spoken

LEAKED: list[object] = []


def made(number: int) -> int:
    """The number itself."""
    return number


def held(case: int) -> str:
    """Do what this case is for."""
    match case:
        case 1:
            raise IndexError("index out of range")
        case 2:
            while True:
                pass
        case 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 4:
            LEAKED.append(bytes(1 << 30))
        case 5:
            LEAKED.append(os.open("/dev/null", os.O_RDONLY))
        case 6:
            return "What xz packed in it is damaged: MemoryError"
        case 7:
            return spoken(MalformedTree(""))
        case 8:
            raise RecursionError("maximum recursion depth exceeded")
        case 9:
            return spoken(MalformedTree("The tree is damaged at 0x10"))
    return ""
