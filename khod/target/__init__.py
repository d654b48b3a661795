# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel: what is asked for, whether this host can load it, what it would take over."""
