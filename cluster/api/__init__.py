"""The public APIs, gRPC and HTTP: thin adapters that validate and translate requests for the coordinator."""
