# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs a handover: operations, the transaction they move, the attempt that acts, the restoration afterwards."""

from khod.engine.operations import Engine

__all__ = ["Engine"]
