# SPDX-License-Identifier: LGPL-2.1-or-later
"""Before the jump: the rest of the host is stopped and its file systems are frozen; each with its undo."""
