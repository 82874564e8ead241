"""Detects JSON Schema keywords that the grammar compiler accepts but does not enforce, so that they can be rejected.

A grammar cannot remember which keys have occurred. If a schema leaves key names open, a key may occur twice. The
grammar then counts more members than a reader of the document finds.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["find_unenforced"]

_DATA: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are data, not schemas."""


def find_unenforced(schema: Any) -> str:
    """Return why a document could violate the parsed ``schema`` despite its grammar, as a clause; "" if it cannot."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if _counts_open_keys(node):
                return "minProperties above 1 is enforced only if that many properties are required by name"
            pending += [inner for key, inner in node.items() if key not in _DATA]
        elif isinstance(node, list):
            pending += node
    return ""


def _counts_open_keys(schema: dict[str, Any]) -> bool:
    least = schema.get("minProperties")
    required = schema.get("required")
    known = len(set(map(str, required))) if isinstance(required, list) else 0
    return isinstance(least, int | float) and least > max(1, known)
