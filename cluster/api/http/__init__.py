"""The HTTP API in OpenAI's, Anthropic's and Ollama's formats. It only translates; validation is shared with gRPC."""
