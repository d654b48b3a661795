# SPDX-License-Identifier: LGPL-2.1-or-later
"""State trees for people: shown, exported, compared and held against schemas. Nothing here asks khod or a kernel."""
