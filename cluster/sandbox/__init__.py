"""Runs work whose cost depends on untrusted input in processes that can be killed."""
