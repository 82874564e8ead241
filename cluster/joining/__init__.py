"""How a Mac comes into a cluster: the port that admits, on the coordinator's Mac, and the Mac that asks."""
