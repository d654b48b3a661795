# SPDX-License-Identifier: LGPL-2.1-or-later
"""A handover: its phases, its record, the kernel's state beside it, its snapshot, and what arrived."""
