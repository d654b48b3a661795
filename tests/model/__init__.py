"""A model of one host with everything that can go wrong on it, driven by rules; see `python -m tests.model --help`."""
