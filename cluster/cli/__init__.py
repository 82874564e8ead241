"""The command line, one command per file. It handles terminals, exit codes and processes only."""
