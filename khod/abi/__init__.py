# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's interfaces, one file each, with no policy: a value comes back or OSError is raised."""
