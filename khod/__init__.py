# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod drives Kexec HandOver: it takes a host from one kernel to the next without losing the state it holds."""

__version__ = "0.1.0"
