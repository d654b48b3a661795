# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attempt as JSON, with all that is known of it; programs read this one."""

import json

from khod.history.model import AttemptRecord
from khod.values import encode_value

SCHEMA = "io.kho.Report"
SCHEMA_VERSION = 1
"""Raised when a field goes or changes its meaning; a new field does not raise it."""


def write_document(attempt: AttemptRecord) -> str:
    """Return one line of JSON: `schema`, `version`, and the `attempt` with the fields of AttemptRecord.

    Enums are given by name, as on the wire.
    """
    document = {"schema": SCHEMA, "version": SCHEMA_VERSION, "attempt": attempt}
    return json.dumps(document, default=encode_value) + "\n"
