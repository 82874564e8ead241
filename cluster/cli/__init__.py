"""The command line: one command a file. It knows terminals, exit codes and processes; the work is done elsewhere."""
