"""Converts models: streams the weights of a checkpoint or a GGUF file into a new model folder, layer by layer.

Read ``converter`` first. Only ``cluster.model`` computes. This package decides what is computed next, and what is on
disk.
"""
