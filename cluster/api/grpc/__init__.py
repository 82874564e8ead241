"""The gRPC services: they decode messages into parameters, and encode answers and the cluster's state."""
