# SPDX-License-Identifier: LGPL-2.1-or-later
"""State trees for people: show, export, compare and validate them. Nothing here asks khod or a kernel."""
