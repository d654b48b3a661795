# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl, khod's command line: thin and stateless, it asks khod and shows the answer."""

import gc

gc.set_threshold(200_000)  # the imports of a command are not garbage, and scanning them takes a tenth of its time
