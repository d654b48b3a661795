# SPDX-License-Identifier: LGPL-2.1-or-later
"""One measured figure and the bound it is held to."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What was measured, and the most it may be; `how` says what the figure was made of."""

    name: str
    value: float
    most: float
    unit: str
    how: str

    @property
    def good(self) -> bool:
        """Tell whether the bound holds."""
        return self.value <= self.most

    def __str__(self) -> str:
        mark = "ok  " if self.good else "MISS"
        return f"{mark} {self.name}: {self.value:.2f} {self.unit} (at most {self.most:g}); {self.how}"


def print_figures(figures: Iterable[Figure]) -> int:
    """Print each figure as it comes; return 1 where a bound is missed, else 0."""
    missed = 0
    for figure in figures:
        print(figure, flush=True)
        missed += not figure.good
    return 1 if missed else 0
