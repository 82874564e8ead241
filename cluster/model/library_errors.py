"""Puts a library's error into words that fit into an error sentence of ours."""

from __future__ import annotations

from typing import Final

__all__ = ["describe_error"]

LONGEST: Final = 400
"""Characters of a library's message that go into an error sentence."""


def describe_error(error: Exception) -> str:
    """Return the beginning of a library's message on one line, or the error's type if there is none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
