# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel of our own, for the demonstration and the tests."""
