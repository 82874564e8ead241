"""Encodes and decodes frames on the data plane. Only this package decodes a peer's data stream."""
