# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which kernel this host's boot loader, or its kernel packages, would boot."""
