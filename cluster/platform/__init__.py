"""The operating system: facts about macOS, processes and signals, paths and private files."""
