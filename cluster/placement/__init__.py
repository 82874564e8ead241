"""Decides which worker holds which layers, and explains why. Pure: sizes and speeds in, layer ranges out."""
