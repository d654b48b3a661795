# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run khod-fleetlock: python3 -m khod.fleet COMMAND."""

import sys

from khod.fleet.program import main

sys.exit(main())
