# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record as khod wrote it before claims were apart from the handover under way: nothing of it is lost."""

import json
from typing import Any

import pytest

from khod.config import Config
from khod.handover.record import DEPARTURE, Record
from khod.model import Phase
from khod.producers.hooks import Hook
from khod.values import encode_value
from tests.unit.luo import LuoHost
from tests.unit.test_claims import degraded, host, jump, taken_back, waiting

__all__ = ["host"]

EARLIER = (
    "version phase done run boot_id release generation handovers previous_release window_began_at blackout_seconds "
    "timings last_error verdict suspect producers failed_activations"
)
EARLIER_HOLDER = "name kind told note timeout after before devices owner process kept"
"""Fields of a record as khod wrote it before claims were apart from the handover under way."""


def as_earlier(record: Record, phase: Phase) -> bytes:
    """The record as an earlier khod would have it: what waits stands among the producers, nothing is said of more."""
    values: dict[str, Any] = json.loads(json.dumps(record, default=encode_value))
    holders = values["claims"] or values["producers"]
    values |= {
        "phase": phase.name,
        "producers": [{key: held[key] for key in EARLIER_HOLDER.split()} for held in holders],
    }
    if values["verdict"]:
        del values["verdict"]["findings"], values["verdict"]["unknown"]
    return json.dumps({key: values[key] for key in EARLIER.split()}).encode()


async def test_the_jump_of_an_earlier_khod_loses_nothing(host: LuoHost) -> None:
    await jump(host, Hook("mine", commands={"restore": ["/bin/true"]}), Hook("none", commands={"freeze": ["true"]}))
    host.store.record_path.write_bytes(as_earlier(host.record, Phase.executing))
    (host.store.directory / DEPARTURE).unlink()
    engine = await host.started()
    await taken_back(host, engine)
    verdict = (await engine.queries.status()).verdict
    assert verdict is not None
    assert {"kv", "mine"} <= set(verdict.arrived)
    assert "none" not in [*verdict.arrived, *verdict.missing]


@pytest.mark.parametrize("phase", [Phase.verifying, Phase.degraded])
async def test_what_waits_in_an_earlier_khod_s_record_is_not_lost(host: LuoHost, phase: Phase) -> None:
    await degraded(host)
    host.store.record_path.write_bytes(as_earlier(host.record, phase))
    host.config = Config()
    engine = await host.started()
    assert waiting(host)
    await taken_back(host, engine)
