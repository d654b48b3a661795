# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab: real kernels in QEMU, on a real Debian, with khod installed. README.md says how to use it."""
