"""Examines a Mac: what is wrong with it, why that matters, and which command mends it. It changes nothing."""
