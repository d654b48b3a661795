# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a journal record of khod's has: its MESSAGE_ID, its priority, its text and its fields.

`journalctl MESSAGE_ID=...` finds every record of a kind. systemd/catalog has an entry for each, which `journalctl -x`
shows: what it means, and what to do. Durations are whole microseconds, as systemd's own (`*_USEC`).
"""

import enum
from typing import Any

from khod.handover.machine import RESTING, STEPS
from khod.handover.record import Record
from khod.model import Event, EventKind, Phase
from khod.producers.barrier import READY


class Priority(enum.IntEnum):
    """The priorities of syslog(3) that khod uses."""

    crit = 2
    """Producers may stand still until somebody acts."""
    err = 3
    """State is lost, or an undo failed."""
    warning = 4
    """A handover does not go on, or something of khod's is not right."""
    notice = 5
    """A handover begins, jumps, or has succeeded."""
    info = 6


class Message(enum.Enum):
    """The records that are not of a phase: MESSAGE_ID and priority."""

    refusal = ("09339c4f209b425199c51ad7a46893be", Priority.warning)
    """A producer's answer that is not a yes."""
    device = ("48c528a126654d7bb97baa3d11aacbe7", Priority.notice)
    """A device came or went while a handover was under way."""
    finding = ("2895076cb6d24b7bb77ada11fac86090", Priority.warning)
    """One problem that the verification found."""
    cold_boot = ("d746002111364b77925d3eab6ceca7cd", Priority.err)
    """What is known of a handover that ended as a cold boot."""
    image_barred = ("37ec30ed4dbf42588db162f0aef3d254", Priority.warning)
    """An image is refused from now on."""
    history_set_aside = ("beb02402b56542dcab7c8e1ccace7ca1", Priority.err)
    """The history's database could not be used, and was renamed."""
    metrics_unwritten = ("cadde61b60654d0d910e9cd3f2b2d03e", Priority.warning)
    """The file of the metrics could not be written."""

    def __init__(self, identifier: str, priority: Priority) -> None:
        self.identifier = identifier
        self.priority = priority


PHASE_IDS: dict[Phase, str] = {
    Phase.idle: "f959b6f37f394c8f9cc571383da7a9f0",
    Phase.preparing: "1772bfd698e5465aa40855894a615dc8",
    Phase.prepared: "059b2629a82c44078af7d73e6a50c6dd",
    Phase.freezing: "6ed80f157a86486e86ae0f9b48f47b0c",
    Phase.quiescing: "21ec3542d4104e80bd11c9494b72faa0",
    Phase.quiesced: "3e1b7f2cb29b4d8b986d0c6175f355d9",
    Phase.frozen: "7a1c533f926e4521baeefaf89142d89b",
    Phase.activating: "ca49721426904c95b910458386083bbf",
    Phase.active: "57d019edc95b4d90b3635fb6cd74d119",
    Phase.loading: "5c28ec0c5d344f13a7112e102028d623",
    Phase.loaded: "e6a61ab289d7493486b06151b4ea63f3",
    Phase.executing: "38cd4e6d43a24ccdb77ff22d3ec5232c",
    Phase.verifying: "0f0b7746f4e4408fb5178d4f839fb761",
    Phase.verified: "03053606e86346b3969bc1092e30937a",
    Phase.degraded: "68425e8121ed4ac2bdb7586746187593",
    Phase.cold_boot: "d5be68c9e6fa48ae809e682a7d16d5f9",
    Phase.rolling_back: "7bf92476698849a193a7a247d20adf9e",
    Phase.failed: "6ffa26cb0a0b4dbb95721cfe54213321",
    Phase.foreign: "720250eaedd047ba9461aee99e278aee",
    Phase.inconsistent: "9de339c0b2424de088a7c783673d2460",
}
"""The MESSAGE_ID of the record with which each phase is entered."""
PHASE_PRIORITIES = {
    Phase.failed: Priority.crit,
    Phase.inconsistent: Priority.crit,
    Phase.cold_boot: Priority.err,
    Phase.degraded: Priority.err,
    Phase.foreign: Priority.warning,
    Phase.rolling_back: Priority.warning,
    Phase.preparing: Priority.notice,
    Phase.executing: Priority.notice,
    Phase.verified: Priority.notice,
}
"""The priority of the record with which a phase is entered; `info` for the others."""
UNDOING = (Phase.rolling_back, Phase.failed, Phase.inconsistent)
"""The phases in which a note says what an undo did not reach, and a no keeps a producer from going on."""
STEP_OF_PHASE = {row.doing: step.value for step, row in STEPS.items()}
"""The step that is under way in each phase."""


def count_usec(seconds: float) -> str:
    """Return seconds as a field: whole microseconds."""
    return str(round(seconds * 1e6))


def event_fields(event: Event, *, entered: bool, record: Record) -> tuple[str, dict[str, Any]]:
    """Return the text and the fields of an event's record.

    `entered` says whether the phase differs from that of the event before: the record then has the phase's MESSAGE_ID.
    `record` is the handover's.
    """
    found: dict[str, Any] = {
        **_common_fields(_event_priority(event, entered=entered), event.run),
        "KHO_PHASE": event.phase.value,
        "KHO_EVENT": event.kind.value,
    }
    if entered:
        found["MESSAGE_ID"] = PHASE_IDS[event.phase]
        if record.blackout_seconds is not None and event.phase in (Phase.verified, Phase.degraded):
            found["KHO_BLACKOUT_USEC"] = count_usec(record.blackout_seconds)
    if record.begun.at and event.run and (entered or event.phase not in RESTING):
        found |= {"KHO_INITIATOR": record.begun.by, "KHO_IMAGE": record.begun.image}
    if event.step or event.phase in STEP_OF_PHASE:
        found["KHO_STEP"] = event.step or STEP_OF_PHASE[event.phase]
    if event.duration is not None:
        found["KHO_DURATION_USEC"] = count_usec(event.duration)
    if (producer := event.producer) is not None:
        found |= {"KHO_PRODUCER": producer.name, "KHO_KIND": producer.kind}
        if producer.phase:
            found |= {"KHO_VERB": producer.phase, "KHO_DURATION_USEC": count_usec(producer.seconds)}
    if (message := _message_of(event)) is not None:
        found["MESSAGE_ID"] = message.identifier
    return f"{event.phase.value.replace('_', ' ')}: {event.message}", found


def message_fields(message: Message, run: str, fields: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a record that is not an event's; of `fields` those with a text."""
    found = _common_fields(message.priority, run) | {"MESSAGE_ID": message.identifier}
    return found | {name: value for name, value in fields.items() if value}


def _common_fields(priority: Priority, run: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "PRIORITY": int(priority),
        "SYSLOG_IDENTIFIER": "khod",
        "CODE_FUNC": "",  # the place in khod is of no use, and systemd would search the stack for it
    }
    return found | {"KHO_RUN": run} if run else found


def _message_of(event: Event) -> Message | None:
    """Return the message that an event is, if it is one by itself."""
    if event.kind is EventKind.device:
        return Message.device
    answered = event.kind is EventKind.producer_answered and event.producer is not None and event.producer.phase
    return Message.refusal if answered and event.producer is not None and event.producer.answer != READY else None


def _event_priority(event: Event, *, entered: bool) -> Priority:
    priority = PHASE_PRIORITIES.get(event.phase, Priority.info) if entered else Priority.info
    if event.kind is EventKind.note and event.phase in UNDOING:
        priority = min(priority, Priority.warning)
    if (message := _message_of(event)) is not None:
        undoing = message is Message.refusal and event.phase in UNDOING
        priority = min(priority, Priority.err if undoing else message.priority)
    return priority
