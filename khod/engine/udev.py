# SPDX-License-Identifier: LGPL-2.1-or-later
"""libudev, which pyudev searches for with a child process: once, when this module is imported."""

import pyudev

CONTEXT = pyudev.Context()
