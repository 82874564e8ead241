"""Core types to protobuf messages and back: one encoder and one decoder for each type."""
