# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attempt as a document: JSON as on the wire, compressed where it is large, with a digest."""

import dataclasses
import functools
import hashlib
import json
import types
import zlib
from dataclasses import replace
from typing import Any, TypeVar, get_args, get_type_hints

from khod.history.model import AttemptRecord, AttemptSummary
from khod.model import EventKind
from khod.values import DecodeError, decode_value, encode_value

T = TypeVar("T")
PLAIN_BYTES = 4096
"""A document of more bytes is compressed."""

MAX_DOCUMENT_BYTES = 6 << 20
"""The maximum size of a document before it is compressed.

khod sends a document as one reply, and holds at most 8 MiB for one user that does not read. A thousand producers with
eight events each need 3.4 MiB.
"""
OF_PRODUCERS = (EventKind.producer_waits, EventKind.producer_called, EventKind.producer_answered)
"""The events that are left out of a document that is too large, in this order."""


class DamagedDocument(ValueError):
    """The bytes are not a document that this version of khod can read."""


def encode_document(attempt: AttemptRecord) -> bytes:
    """Return the document of an attempt; if it is too large, events of producers are left out, and `damage` says so."""
    text = _encode_text(attempt)
    for count in range(1, len(OF_PRODUCERS) + 1):
        if len(text) > MAX_DOCUMENT_BYTES:
            text = _encode_text(_without_events(attempt, OF_PRODUCERS[:count]))
    if len(text) > MAX_DOCUMENT_BYTES:
        text = _encode_text(_without_events(attempt, tuple(EventKind)))
    return zlib.compress(text) if len(text) > PLAIN_BYTES else text


def _without_events(attempt: AttemptRecord, kinds: tuple[EventKind, ...]) -> AttemptRecord:
    kept = [event for event in attempt.events if event.kind not in kinds]
    said = f"{len(attempt.events) - len(kept)} events left out: the attempt is too large to be kept with all of them"
    return replace(attempt, events=kept, damage="; ".join(filter(None, (attempt.damage, said))))


def decode_document(document: bytes) -> AttemptRecord:
    """Return the attempt of a document; raise DamagedDocument if it cannot be read."""
    if document.startswith(b"{"):
        return _decode_text(AttemptRecord, document)
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(document, MAX_DOCUMENT_BYTES)
    except zlib.error as error:
        raise DamagedDocument(f"it cannot be unpacked: {error}") from None
    if not reader.eof:
        raise DamagedDocument("it is cut off, or too large")
    return _decode_text(AttemptRecord, text)


def encode_summary(summary: AttemptSummary) -> bytes:
    """Return a summary as JSON."""
    return _encode_text(summary)


def decode_summary(text: bytes) -> AttemptSummary:
    """Return the summary of its JSON; raise DamagedDocument if it cannot be read."""
    return _decode_text(AttemptSummary, text)


def row_digest(run: str, summary: bytes, document: bytes) -> bytes:
    """Return the SHA-256 of what is stored of one attempt."""
    return hashlib.sha256(b"\0".join((run.encode(), summary, document))).digest()


def _encode_text(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=encode_value).encode()


def _decode_text(wanted: type[T], text: bytes) -> T:
    kind: Any = wanted
    try:
        return decode_value(wanted, json.loads(text), may_lack=optional_fields(kind))
    except (ValueError, RecursionError, TypeError) as error:  # TypeError: a field without a default is missing
        raise DamagedDocument(error if isinstance(error, DecodeError) else "it is not the JSON of an attempt") from None


@functools.cache
def optional_fields(kind: Any) -> frozenset[str]:
    """Return the names of the fields with a default, in a dataclass and in all dataclasses below it.

    They may be missing in what an earlier khod has written: a field that is added has a default.
    """
    found: set[str] = set()
    for one in _dataclasses_below(kind, set()):
        found |= {
            field.name
            for field in dataclasses.fields(one)
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        }
    return frozenset(found)


def _dataclasses_below(hint: Any, seen: set[Any]) -> set[Any]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(hint, types.GenericAlias):
        if hint not in seen:
            seen.add(hint)
            for below in get_type_hints(hint).values():
                _dataclasses_below(below, seen)
    else:
        for below in get_args(hint):
            _dataclasses_below(below, seen)
    return seen
