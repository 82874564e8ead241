"""Fuzzing of whatever reads bytes that somebody else wrote: a table of targets, a kept corpus, short and long runs."""
