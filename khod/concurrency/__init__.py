# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khod waits: with a time limit, or in a thread of its own."""
