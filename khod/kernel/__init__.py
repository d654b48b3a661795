# SPDX-License-Identifier: LGPL-2.1-or-later
"""KHO's generations behind one protocol, chosen by probing, and what they share.

`probe_kho` finds out how userspace drives the running kernel; nothing above this package asks for the generation.
"""
