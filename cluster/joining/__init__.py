"""Joining a cluster: the port on the coordinator's Mac that admits, and the Mac that asks."""
