"""Generated from protos/cluster/v1 by ops/protos."""
