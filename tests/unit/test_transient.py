# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of the units that hooks run in. What systemd does with them, tests/lab/test_hooks.py shows."""

from itertools import product

from khod.producers.configured import check_name
from khod.producers.transient import MAX_UNITS, unit_name
from khod.producers.unit import NAME

PRODUCERS = ["a", "a.1", "a-1", "a@1", "a@", "ax401", "a_1", "1", "A" * 64, "a.service", "a.1.service"]


def test_every_producer_has_units_of_its_own() -> None:
    for producer in PRODUCERS:
        check_name(producer)
    names = [unit_name(producer, number) for producer, number in product(PRODUCERS, range(MAX_UNITS))]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) and "@" not in name and len(name) < 256 for name in names)
