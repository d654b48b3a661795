# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often what is repeated runs: a part of it in `make test`, all of it in `make proof`."""

import os

PROOF = "KHO_PROOF" in os.environ
"""Whether this is `make proof`."""


def repetitions(whole: int, *, test: int) -> int:
    """Give `whole` in `make proof`, and `test` of them otherwise."""
    return whole if PROOF else test
