# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of khoctl, one module for each group."""
