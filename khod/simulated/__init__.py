"""A kernel of our own, for the demonstration and the tests."""
