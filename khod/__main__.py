# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m khod."""

from khod.daemon import main

main()
