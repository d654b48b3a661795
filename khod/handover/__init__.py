# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a handover is: its machine, its record, what the kernel shows of it, what it left and what arrived."""
