# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a record in the journal has: text, priority, and fields to search by."""

import re
from dataclasses import replace
from typing import Any

import pytest

from khod.engine import journal
from khod.handover.record import Record
from khod.model import Begun, Event, EventKind, Phase, Producer, StepTiming
from tests.unit.khods import REPOSITORY

RECORD = Record(begun=Begun(1.0, "root (khoctl, process 7)", "vmlinuz"), timings=(StepTiming("freeze", 1.0, 0.25),))


def written(event: Event, *, entered: bool = False) -> tuple[str, dict[str, Any]]:
    return journal.record_fields(event, entered=entered, record=RECORD)


def about(answer: str, *, waiting: bool = False) -> Event:
    told = Producer("db", "hook", 0, "freeze", answer, 1.5, waiting, None)
    kind = EventKind.producer_waits if waiting else EventKind.producer_answered
    return Event(
        1.0, Phase.freezing, f"db: freeze: {answer}", "run", told, kind=kind, duration=None if waiting else 1.5
    )


def test_a_phase_that_is_entered_has_its_message_id_once() -> None:
    entered = Event(1.0, Phase.frozen, "freeze took 0.250 s", "run")
    assert written(entered, entered=True)[1]["MESSAGE_ID"] == journal.MESSAGE_ID[Phase.frozen]
    assert "MESSAGE_ID" not in written(entered)[1]


def test_a_record_says_who_began_the_handover_and_what_a_step_took() -> None:
    ended = Event(
        1.0, Phase.frozen, "freeze took 0.250 s", "run", kind=EventKind.step_ended, step="freeze", duration=0.25
    )
    found = written(ended, entered=True)[1]
    assert found["KHO_EVENT"] == "step_ended"
    assert (found["KHO_STEP"], found["KHO_SECONDS"]) == ("freeze", "0.250")
    assert (found["KHO_BY"], found["KHO_IMAGE"]) == ("root (khoctl, process 7)", "vmlinuz")
    assert "KHO_BY" not in written(Event(1.0, Phase.idle, "khod started", ""))[1]


@pytest.mark.parametrize(
    ("event", "priority", "message_id"),
    [
        (about("ready"), journal.INFO, None),
        (about("not yet: a checkpoint", waiting=True), journal.INFO, None),
        (about("no luck"), journal.WARNING, journal.REFUSAL_ID),
        (replace(about("stuck"), phase=Phase.failed), journal.ERR, journal.REFUSAL_ID),
    ],
)
def test_a_no_is_a_warning_and_is_found_by_its_message_id(event: Event, priority: int, message_id: str | None) -> None:
    text, found = written(event)
    assert text == f"{event.phase.value}: {event.message}"
    assert (found["PRIORITY"], found.get("MESSAGE_ID")) == (priority, message_id)
    assert (found["KHO_PRODUCER"], found["KHO_VERB"], found["KHO_SECONDS"]) == ("db", "freeze", "1.500")


def test_the_catalogue_has_every_message() -> None:
    text = (REPOSITORY / "systemd/catalog/khod.catalog").read_text()
    assert set(re.findall(r"^-- ([0-9a-f]{32})$", text, re.MULTILINE)) == {
        *journal.MESSAGE_ID.values(),
        journal.REFUSAL_ID,
    }
    assert text.count("\nSubject: ") == len(journal.MESSAGE_ID) + 1
