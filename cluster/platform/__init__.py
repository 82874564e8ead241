"""What the operating system says and takes: macOS facts, processes and signals, paths."""
