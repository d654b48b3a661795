# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions and messages to the service manager and to logind."""
