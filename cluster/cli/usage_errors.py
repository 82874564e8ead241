"""Says in plain words which value of an option is wrong, and what it may be. Typer repeats pydantic's sentences."""

from __future__ import annotations

from typing import Any, Final

from typer import BadParameter

from cluster.cli.number_ranges import describe_bounds

_WANTED: Final = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a number",
}
_BOUNDS: Final = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})


def explain_bad_value(error: BadParameter) -> None:
    """Replace the message of an error that comes from pydantic; leave any other as it is."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return
    found: Any = error.__cause__.errors(include_url=False)[0]
    kind, given = found["type"], str(found["input"])[:64]
    if wanted := _WANTED.get(kind):
        error.message = f"{given!r} is not {wanted}"
    elif kind in _BOUNDS:
        error.message = f"{given} is out of range; give {describe_bounds(error.param)}"
    elif kind == "value_error":
        error.message = str(found["ctx"]["error"]).rstrip(".")
