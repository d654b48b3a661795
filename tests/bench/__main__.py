# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run every benchmark; exits with 1 where a bound is missed."""

import sys
from collections.abc import Callable, Iterator

from tests.bench import attackers, barrier, contents, history, hooks, images, overhead, processes, trees, vm, window
from tests.bench.figure import Figure

BENCHES: list[Callable[[], Iterator[Figure]]] = [
    overhead.run,
    processes.run,
    trees.run,
    images.run,
    barrier.run,
    contents.run,
    attackers.run,
    history.run,
    vm.run,
    hooks.run,
    window.run,
]


def main() -> int:
    """Print each figure as it comes."""
    missed = 0
    for bench in BENCHES:
        for figure in bench():
            print(figure, flush=True)
            missed += not figure.good
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
