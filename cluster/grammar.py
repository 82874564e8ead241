"""What an answer can be bound to: a JSON schema, any JSON object, a regular expression, or a Lark grammar."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Grammar", "GrammarKind"]


class GrammarKind(StrEnum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be. ``source`` is the schema as JSON text, the regex, or Lark; "" for any JSON object.

    ``free_until`` are the token ids that end the part before it which is not constrained, the reasoning; () where the
    answer's first token is.
    """

    kind: GrammarKind
    source: str = ""
    free_until: tuple[int, ...] = ()
