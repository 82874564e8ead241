"""Ranges of numbers that options take, in words."""

from __future__ import annotations

from typing import Any


def describe_range(option: Any) -> str:
    """Return the range of a number that is bounded on both sides, except a port; else empty."""
    least, most = getattr(option, "min", None), getattr(option, "max", None)
    if least is None or most is None or option.metavar == "PORT":
        return ""
    return f"{plain_number(least)} to {plain_number(most)}"


def describe_bounds(option: Any) -> str:
    """Return the range of a number that has one bound or both."""
    least: Any = getattr(option, "min", None)
    most: Any = getattr(option, "max", None)
    if most is None:
        return f"at least {plain_number(least)}"
    return (
        f"at most {plain_number(most)}"
        if least is None
        else f"a number from {plain_number(least)} to {plain_number(most)}"
    )


def plain_number(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
