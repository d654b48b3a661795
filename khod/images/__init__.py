# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel and initrd images: read into memory once, examined there, and loaded from there."""
