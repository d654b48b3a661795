# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel and initrd images: taken into memory once, looked at there, loaded from there."""
