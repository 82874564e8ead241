"""Decides which frame is written next. Pure: it is told events, it returns frames and tokens; no I/O, no clock."""
