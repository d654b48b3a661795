# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's interfaces, one file each, without policy: each call returns a value or raises OSError."""
