# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m khoctl."""

from khoctl.app import main

main()
