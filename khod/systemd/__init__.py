# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the service manager is asked and told."""
