# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many hosts at once: who they are (inventory), what they say (collect), who stands out (assess), and as a table."""
