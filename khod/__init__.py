# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod drives Kexec HandOver: one kernel to the next, without losing what the host holds."""

__version__ = "0.1.0"
