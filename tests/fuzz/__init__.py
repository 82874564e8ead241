"""Fuzzing of every decoder of foreign bytes: a table of targets, a corpus, short and long runs."""
