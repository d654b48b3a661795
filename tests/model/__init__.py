# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of one host with everything that can go wrong on it, driven by rules; see `python -m tests.model --help`."""
