"""Checks the types in a tool's JSON Schema. The grammar compiler decides what of a schema can be enforced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from cluster.api.http.body import MAX_FIELD_CHARS
from cluster.core.errors import InvalidRequest

_TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_ONE: Final = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS: Final = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED: Final = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


@dataclass(frozen=True, slots=True)
class _Place:
    """The location of a schema. Its path is built only for an error, since paths in deep schemas are long."""

    outer: _Place | None
    name: str

    @property
    def path(self) -> str:
        names = []
        place = self
        while place.outer:
            names.append(place.name)
            place = place.outer
        return "".join((place.name, *reversed(names)))[:MAX_FIELD_CHARS]


def check_schema(schema: dict[str, Any], field: str) -> None:
    """Raise ``InvalidRequest``, naming the location, for a type that JSON Schema does not have.

    A model would have to guess what such a type means.
    """
    pending = [(schema, _Place(None, field))]
    while pending:
        one, place = pending.pop()
        kinds = one.get("type")
        for kind in kinds if isinstance(kinds, list) else [] if kinds is None else [kinds]:
            if not isinstance(kind, str) or kind not in _TYPES:
                path = place.path
                raise InvalidRequest(
                    f"{path}.type is not a JSON Schema type; use one of {', '.join(sorted(_TYPES))}",
                    field=f"{path}.type",
                )
        pending.extend(_inner(one, place))


def _inner(schema: dict[str, Any], place: _Place) -> Iterator[tuple[dict[str, Any], _Place]]:
    """Yield the direct subschemas of a schema, each with its location."""
    for word, value in schema.items():
        if word in _NAMED and isinstance(value, dict):
            found = [(inner, _Place(place, f".{word}.{name[:64]}")) for name, inner in value.items()]
        elif word in _LISTS and isinstance(value, list):
            found = [(inner, _Place(place, f".{word}[{i}]")) for i, inner in enumerate(value)]
        elif word in _ONE:
            found = [(value, _Place(place, f".{word}"))]
        else:
            continue
        yield from ((inner, where) for inner, where in found if isinstance(inner, dict))
