"""The types, errors and limits that every room shares. Depends on the standard library alone."""
