# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run every benchmark; exits with 1 where a bound is missed."""

import sys
from collections.abc import Callable, Iterator

from tests.bench import (
    attackers,
    barrier,
    blackout,
    contents,
    history,
    hooks,
    images,
    overhead,
    processes,
    starting,
    trees,
    vm,
    window,
)
from tests.bench.figure import Figure, print_figures

BENCHES: list[Callable[[], Iterator[Figure]]] = [
    overhead.run,
    processes.run,
    starting.run,
    trees.run,
    images.run,
    barrier.run,
    contents.run,
    attackers.run,
    history.run,
    vm.run,
    hooks.run,
    window.run,
    blackout.run,
]


if __name__ == "__main__":
    sys.exit(print_figures(figure for bench in BENCHES for figure in bench()))
