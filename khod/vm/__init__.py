# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual machines of QEMU: their monitor, and their way through a kexec."""
