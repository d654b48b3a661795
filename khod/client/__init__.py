# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's side of khod's socket, for khoctl and for the producers' library."""
