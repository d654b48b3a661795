# SPDX-License-Identifier: LGPL-2.1-or-later
"""The holders of state outside the kernel, and the barrier they pass together."""
