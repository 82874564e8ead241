"""Decides which workers are up, suspect or gone, and who leads them. Pure: no I/O, no clock of its own."""
