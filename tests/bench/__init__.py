# SPDX-License-Identifier: LGPL-2.1-or-later
"""Speed, as ratios measured side by side: `make bench`."""
