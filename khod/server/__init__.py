# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink server: what the socket serves, and to whom.

Every user may connect and ask. The kernel identifies the user; before that, a client costs no more than a connection.
`limits` says how many connections there may be and what each may hold, `load` how the time is divided, `rules` who may
call what. `sockets` waits for the first client, and imports what serves it.
"""
