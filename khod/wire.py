# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of the Varlink interface, for both ends; `khod.values` is its JSON.

It imports nothing: a producer that starts after the jump has its state only when this is imported.
"""

SOCKET = "/run/khod/io.kho.Handover"
INTERFACE = "io.kho.Handover"
PRODUCER = "io.kho.Producer"
SERVICE = "org.varlink.service"
METRICS_INTERFACE = "io.systemd.Metrics"
PRODUCER_VERSION = 1
MAX_FDS = 253
"""SCM_MAX_FD: the descriptors that one message carries."""
VERB_SECONDS = 30.0
"""The limit for one verb of a producer that names no other."""
FIRST_SERIAL = 1
"""The serial of the first command to a producer."""
