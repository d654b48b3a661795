# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of the Varlink interface, for both ends; `khod.values` is its JSON.

It imports next to nothing: a producer that starts after the jump has its state only when this is imported.
"""

from typing import Any

from khod.errors import BY_NAME, KhoError

SOCKET = "/run/khod/io.kho.Handover"
INTERFACE = "io.kho.Handover"
PRODUCER = "io.kho.Producer"
SERVICE = "org.varlink.service"
METRICS_INTERFACE = "io.systemd.Metrics"
PRODUCER_VERSION = 1


def error_by_name(name: str, parameters: dict[str, Any]) -> KhoError:
    """Return the error with this name on the wire, or a KhoError that quotes the name if it is not one of ours."""
    prefix, _, short = name.rpartition(".")
    if prefix != INTERFACE or short not in BY_NAME:
        return KhoError(f"khod answered {name} {parameters or ''}".strip())
    fields = {key: str(parameters.get(key, "")) for key in ("what", "where", "remedy")}
    error = BY_NAME[short](fields["what"], where=fields["where"], remedy=fields["remedy"])
    error.cause = str(parameters.get("cause") or "")
    return error
