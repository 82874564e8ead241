"""Generate values that our own JSON schemas allow, for the part of the language that our forms use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

WORDS = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
DEEPEST = 4
"""Forms may refer to themselves; below this, what they refer to is anything."""


def allowed(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a schema; ``schemas`` are those that it may refer to."""
    if "$ref" in schema:
        target = schemas[schema["$ref"].rpartition("/")[2]]
        return ANYTHING if depth > DEEPEST else st.deferred(lambda: allowed(target, schemas, depth + 1))
    if "anyOf" in schema:
        return st.one_of(*(allowed(one, schemas, depth) for one in schema["anyOf"]))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 20), 20))
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case "number":
            return number(schema)
        case "array":
            items, least = allowed(schema.get("items", {}), schemas, depth), schema.get("minItems", 0)
            return st.lists(items, min_size=least, max_size=least + 2)
        case "object":
            return record(schema, schemas, depth)
    return ANYTHING


def number(schema: Mapping[str, Any]) -> st.SearchStrategy[float]:
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    return st.floats(least, most, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema)


def record(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" not in schema:
        values = schema.get("additionalProperties")
        inner = allowed(values, schemas, depth) if isinstance(values, dict) else ANYTHING
        return st.dictionaries(WORDS, inner, max_size=3)
    fields = {name: allowed(one, schemas, depth) for name, one in schema["properties"].items()}
    needed = set(schema.get("required", ()))
    return st.fixed_dictionaries(
        {name: one for name, one in fields.items() if name in needed},
        optional={name: one for name, one in fields.items() if name not in needed},
    )
