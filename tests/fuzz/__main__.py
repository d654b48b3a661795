# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hold one case or many by number: `python -m tests.fuzz KIND NUMBER` or `KIND FIRST-LAST`."""

import importlib
import sys

from tests.fuzz.corpus import KINDS as MADE
from tests.fuzz.run import bounded, start

KINDS = (*MADE, "kept", "bombs")


def main() -> int:
    """Say how it ended; 1 where anything failed."""
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        print(f"usage: python -m tests.fuzz {'|'.join(KINDS)} NUMBER|FIRST-LAST", file=sys.stderr)
        return 2
    kind, numbers = sys.argv[1:]
    first, _, last = numbers.partition("-")
    if last:
        report = start(kind, range(int(first), int(last) + 1)).report()
        for ending, count in report.endings.most_common():
            print(f"{count:9}  {ending}")
        print(*report.failures, report, sep="\n")
        return 1 if report.failures else 0
    target = importlib.import_module(f"tests.fuzz.{kind}")
    bounded()
    case = target.made(int(first))
    print(case)
    print(target.held(case) or "read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
