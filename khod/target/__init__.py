# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next kernel: the request, whether this host can load it, and what it would take over."""
