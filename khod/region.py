# SPDX-License-Identifier: LGPL-2.1-or-later
"""A range of physical memory, outside `khod.model` because importing that costs more than reading a tree."""

from khod.dataclass import dataclass


@dataclass(frozen=True)
class Region:
    """A range of physical memory: `addr` and `size` in bytes."""

    addr: int
    size: int
