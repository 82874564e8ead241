"""Faults from a seed: a proxy between any two parties, processes that die or stop, and a checker of the promise."""
