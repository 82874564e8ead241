"""The worker: a daemon that a person starts on each Mac, and the engine it supervises.

The daemon knows identity, discovery, the control plane and its child; it never imports mlx. The engine knows the model
and the data plane; it never talks to the coordinator's control plane.
"""
