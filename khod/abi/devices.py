# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where device nodes are."""

BOUND_DEVICES = "/run/kho-devices"
"""Where khod's unit shows it the host's /dev: its own has no links, as the unit says PrivateDevices=."""
