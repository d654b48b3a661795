# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fuzzing run: whole trees, images and boot entries from tests/unit/corpus, damaged by number, and read.

    python -m tests.fuzz trees 12345        # one case again, with its traceback
    python -m tests.fuzz images 0-1000000   # as many as you like, how they ended, and what they took

A case is made of its number and the corpus' whole files alone. tests/unit/test_fuzz.py runs the first of each kind, and
every damaged file that is kept. What a run finds is kept: a file under tests/unit/corpus/kept with a name that says
what it is, and a line in endings.toml there.
"""
