"""Decides which workers are up, suspect or gone, from what was heard and when. Pure: no I/O, no clock."""
