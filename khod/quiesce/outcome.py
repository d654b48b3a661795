# SPDX-License-Identifier: LGPL-2.1-or-later
"""What came of starting the host's units again."""

from collections.abc import Mapping
from dataclasses import field

from khod.dataclass import dataclass


@dataclass(frozen=True)
class Started:
    """The units that do not run after a start, with the reason each.

    Of `left` somebody else has decided so: the unit was masked or taken away, its conditions do not hold, or it has
    ended with success.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
