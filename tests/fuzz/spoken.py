# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an error of ours says."""

from khod.errors import KhoError


def spoken(error: KhoError) -> str:
    """Its words, which must be there, and whole must be fit for a terminal."""
    assert error.what, "an error that says nothing"
    assert str(error).isprintable(), f"this must not go to a terminal: {str(error)!r}"
    return error.what
