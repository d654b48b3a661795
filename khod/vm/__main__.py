# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run khod-vm: python3 -m khod.vm NAME."""

import sys

from khod.vm.supervisor import main

sys.exit(main())
