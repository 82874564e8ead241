"""Fault tests from seeds: a proxy between any two parties, processes that die or stop, and a checker of the promise."""
