# SPDX-License-Identifier: LGPL-2.1-or-later
"""An error says its cause in a field: over the wire with the name and exit code it always had, and in khoctl's JSON."""

import json
from pathlib import Path

import pytest

from khod import errors
from khod.client.connection import error_by_name
from khod.errors import (
    BY_NAME,
    Aborted,
    Busy,
    CheckFailed,
    Exit,
    KhoError,
    NoKernelGiven,
    ProducerRefused,
    ProducerTimedOut,
    error_name,
)
from khod.server.messages import encode_error
from tests.unit.harness import Host
from tests.unit.khods import Khod

MADE: list[tuple[KhoError, str, Exit]] = [
    (Busy("Another operation is under way"), "Refused", Exit.refused),
    (CheckFailed("It is not signed", check="signature"), "Refused", Exit.refused),
    (ProducerRefused("Producer a refuses", kind="hook", producer="a", verb="freeze"), "Refused", Exit.refused),
    (ProducerTimedOut("No answer", kind="hook", producer="a", verb="freeze"), "Refused", Exit.refused),
    (NoKernelGiven("No kernel is loaded"), "UsageError", Exit.usage),
    (Aborted("The handover was aborted"), "Failed", Exit.failed),
]


@pytest.mark.parametrize(("error", "name", "code"), MADE, ids=lambda value: getattr(value, "cause", ""))
def test_a_cause_crosses_the_wire_beside_the_name(error: KhoError, name: str, code: Exit) -> None:
    sent = json.loads(encode_error(error).rstrip(b"\0"))
    arrived = error_by_name(sent["error"], sent["parameters"])
    assert (error_name(error), type(arrived).__name__, arrived.exit) == (name, name, code)
    assert (arrived.cause, arrived.what, arrived.where) == (error.cause, error.what, error.where)


def test_a_cause_has_one_class() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KhoError)]
    causes = [cls.cause for cls in classes if cls.__name__ not in BY_NAME and cls is not KhoError]
    assert len(causes) > 5
    assert "" not in causes
    assert len(set(causes)) == len(causes)


async def test_a_veto_says_whose_it_is_and_at_which_verb(host: Host) -> None:
    host.hook("db", {"freeze": "exit 1"})
    engine = await host.started()
    with pytest.raises(ProducerRefused) as raised:
        await engine.activate()
    assert (raised.value.producer, raised.value.verb, raised.value.cause) == ("db", "freeze", "veto")


async def test_a_missed_deadline_is_no_veto(host: Host) -> None:
    host.hook("db", {"freeze": "exec sleep 600"}, timeout=0.2)
    engine = await host.started()
    with pytest.raises(ProducerTimedOut) as raised:
        await engine.activate()
    assert (raised.value.producer, raised.value.cause) == ("db", "no_answer")


def test_khoctl_s_json_has_the_cause(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    answer = khod.khoctl("kexec", "--json")
    khod.close()
    assert answer.code == Exit.usage
    assert answer.json["cause"] == "no_kernel"
