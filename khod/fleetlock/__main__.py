# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run khod-fleetlock: python3 -m khod.fleetlock COMMAND."""

import sys

from khod.fleetlock.program import main

sys.exit(main())
