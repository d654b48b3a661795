# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine that runs a handover: its operations, transaction and attempt, and the restoration after the jump."""

from khod.engine.operations import Engine

__all__ = ["Engine"]
