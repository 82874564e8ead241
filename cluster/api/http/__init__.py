"""The HTTP API in OpenAI's and Anthropic's formats. It only translates; validation is shared with gRPC."""
