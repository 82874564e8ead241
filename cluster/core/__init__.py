"""Types, errors and limits that all packages share. Depends on the standard library alone."""
