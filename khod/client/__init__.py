# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's side of khod's socket: what khoctl and the producers' library speak with."""
