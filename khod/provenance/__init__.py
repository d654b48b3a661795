# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who made the files of the next kernel: pinned digests, and detached signatures by keys that this host trusts."""
