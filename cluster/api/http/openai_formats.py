"""Translates OpenAI's tools, tool calls and response formats into core types."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from cluster.api.http.body import Form, JsonObject, Text, hint
from cluster.api.http.json_response import compact
from cluster.api.http.schema_check import check_schema
from cluster.api.json_elements import ElementCounter
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_TOOL_NAME_CHARS
from cluster.core.request import ChatMessage, Grammar, GrammarKind, Tool


def _no_allowed_tools(choice: object) -> object:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        raise PydanticCustomError(
            "allowed_tools", "allowed_tools is not supported here; send only those tools in tools"
        )
    return choice


RejectAllowedTools = BeforeValidator(_no_allowed_tools)
"""A validator for tool_choice: rejects OpenAI's ``allowed_tools``, which is not supported."""
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", min_length=1, max_length=MAX_TOOL_NAME_CHARS)]
"""The name of a tool or a schema, in the characters that OpenAI and Anthropic allow."""
ServiceTier: TypeAlias = (
    Literal["auto", "default"] | Annotated[Literal["flex", "priority", "scale"], hint("service_tier")]
)
"""How soon a request is served at OpenAI. Here every tier is the same."""
INVALID_ARGUMENTS: Final = "invalid_arguments"
"""The name under which the model is shown arguments of an earlier call that are not a JSON object."""


class FunctionSpec(Form):
    """A function that the model may call. Required calls always follow the schema, with or without ``strict``."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class JsonSchema(Form):
    """A named schema. Answers always follow it, with or without ``strict``."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    name: Name | None = None
    description: Annotated[Text | None, hint("response_format.json_schema.description")] = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Form):
    """The required format of an answer; ``regex`` and ``lark`` are macpipe's additions."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    lark: str | None = None


def decode_grammar(requested: ResponseFormat | None, field: str = "response_format") -> Grammar | None:
    """Return the grammar of a format; None if the answer is free. Raises ``InvalidRequest`` for a missing field."""
    if requested is None or requested.type == "text":
        return None
    if requested.type == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT)
    if requested.type == "json_schema":
        if requested.json_schema is None or requested.json_schema.schema_ is None:
            raise InvalidRequest(f"{field} has no schema", field=f"{field}.json_schema")
        return schema_grammar(requested.json_schema.schema_)
    source = requested.regex if requested.type == "regex" else requested.lark
    if source is None:
        raise InvalidRequest(f"{field} has no {requested.type}", field=f"{field}.{requested.type}")
    return Grammar(GrammarKind(requested.type), source)


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """Return the grammar of a JSON schema."""
    return Grammar(GrammarKind.JSON_SCHEMA, compact(schema))


def decode_tool(spec: FunctionSpec, field: str) -> Tool:
    """Translate a tool. Raises ``InvalidRequest`` if its parameters are not a JSON Schema."""
    check_schema(spec.parameters or {}, f"{field}.parameters")
    schema = compact(spec.parameters) if spec.parameters else ""
    return Tool(name=spec.name, description=spec.description or "", parameters=schema)


def check_answers(turn: ChatMessage, call_ids: Collection[str], field: str) -> None:
    """Raise ``InvalidRequest`` if ``turn`` is a tool message that answers none of the earlier ``call_ids``."""
    if turn.role == "tool" and turn.tool_call_id not in call_ids:
        raise InvalidRequest(f"{field} is {turn.tool_call_id[:64]!r}; no call before it has this id", field=field)


class ArgumentsReader:
    """Reads the arguments of all tool calls of a conversation, and bounds their JSON elements together.

    Arguments are JSON inside strings, which the element count of the body does not cover.
    """

    def __init__(self) -> None:
        self._elements = ElementCounter()

    def text(self, arguments: str) -> str:
        """Return ``arguments`` unchanged if they are a JSON object, ``{}`` if empty, else an object with their text.

        A call that ``max_tokens`` cut has half an object, and agents send it back with an error as its result. Most
        templates need an object. Raises ``TooLarge``.
        """
        data = arguments.encode() or b"{}"
        self._elements.feed(data)
        try:
            value = from_json(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            return compact({INVALID_ARGUMENTS: arguments})
        return arguments or "{}"
