"""What of JSON Schema a grammar takes and does not keep: the compiler says nothing of it, so it is refused here.

A grammar cannot remember which keys have come. Where a schema leaves their names open, a key may come twice, and the
number of members that it counts is more than what a reader of the document finds.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["unkept"]

_DATA: Final = frozenset({"const", "default", "enum", "examples"})
"""What stands there is no schema."""


def unkept(schema: Any) -> str:
    """Why documents could break ``schema``, a parsed one, for a sentence; "" where they cannot."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if _counts_open_keys(one):
                return "minProperties of more than 1 is kept only where that many properties are required by name"
            waiting += [inner for key, inner in one.items() if key not in _DATA]
        elif isinstance(one, list):
            waiting += one
    return ""


def _counts_open_keys(schema: dict[str, Any]) -> bool:
    least, required = schema.get("minProperties"), schema.get("required")
    known = len(set(map(str, required))) if isinstance(required, list) else 0
    return isinstance(least, int | float) and least > max(1, known)
