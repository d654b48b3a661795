# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated kernel, for the demonstration and the tests."""
