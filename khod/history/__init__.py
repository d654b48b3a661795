# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod remembers of its handovers: the log of each run, the attempt made of it, and the database of all attempts.

Data and arithmetic alone: nothing in here asks the kernel or systemd, so khoctl reads a database without khod.
"""
