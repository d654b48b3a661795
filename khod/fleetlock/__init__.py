# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-fleetlock: the client of a FleetLock server, a program of its own, because khod has no network."""

FILE = "etc/kho/fleetlock.toml"
