"""The HTTP surface: OpenAI's and Anthropic's, over the same intake as gRPC. It translates, and decides nothing else."""
