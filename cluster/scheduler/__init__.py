"""Decides which frame to write next. Pure: events in, frames and tokens out; no I/O, no clock."""
