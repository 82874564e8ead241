"""The worker: a daemon that a person starts on each Mac, and the engine process that it supervises.

The daemon has the identity, discovery and the control plane; it never imports mlx. The engine has the model and the
data plane; it never uses the coordinator's control plane.
"""
