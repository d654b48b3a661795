# SPDX-License-Identifier: LGPL-2.1-or-later
"""One attempt at a handover as a document: a page, a picture of its timeline, a trace, JSON.

Each writer takes an `AttemptRecord` and returns text; nothing in here asks khod or reads a file.
"""
