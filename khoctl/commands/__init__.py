# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of khoctl, a module for each group of them."""
