"""Conversion between core types and protobuf messages: one encoder and one decoder for each type."""
