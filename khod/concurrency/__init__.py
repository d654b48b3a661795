# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khod waits: within a bound, or in a thread of its own."""
