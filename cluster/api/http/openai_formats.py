"""Tools and answer formats in OpenAI's notation, as the intake takes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from cluster.api.elements import ElementCounter
from cluster.api.http.body import Form, Ignored, JsonObject
from cluster.api.http.json_response import compact
from cluster.api.http.schema_check import check_schema
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_TOOL_NAME_CHARS
from cluster.v1 import inference_pb2 as pb

_MODES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def _no_allowed_tools(choice: object) -> object:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        raise PydanticCustomError(
            "allowed_tools", "allowed_tools is not supported here; give those tools alone in tools"
        )
    return choice


Choosable = BeforeValidator(_no_allowed_tools)
"""For tool_choice: what OpenAI has there beside what we take."""
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", min_length=1, max_length=MAX_TOOL_NAME_CHARS)]
"""Of a tool, or of a schema: what OpenAI and Anthropic take there."""


class FunctionSpec(Form):
    """A function that the model may call. Calls that must be made always keep to the schema, ``strict`` or not."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class JsonSchema(Form):
    """A named schema. Answers always keep to it, ``strict`` or not."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    name: Name | None = None
    description: Ignored = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Form):
    """What an answer must be; ``regex`` and ``lark`` are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    lark: str | None = None


def grammar_of(asked: ResponseFormat | None, field: str = "response_format") -> pb.Grammar | None:
    """The grammar of a format. Raises ``InvalidRequest`` where it lacks what its type needs."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return pb.Grammar(json_object=True)
    if asked.type == "json_schema":
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise InvalidRequest(f"{field} has no schema", field=f"{field}.json_schema")
        return schema_grammar(asked.json_schema.schema_)
    source = asked.regex if asked.type == "regex" else asked.lark
    if source is None:
        raise InvalidRequest(f"{field} has no {asked.type}", field=f"{field}.{asked.type}")
    return pb.Grammar(regex=source) if asked.type == "regex" else pb.Grammar(lark=source)


def schema_grammar(schema: dict[str, Any]) -> pb.Grammar:
    """The grammar of a JSON schema."""
    return pb.Grammar(json_schema=compact(schema))


def tool_of(spec: FunctionSpec, field: str) -> pb.Tool:
    """A tool for the model's template. Raises ``InvalidRequest`` where ``field``.parameters are no schema."""
    check_schema(spec.parameters or {}, f"{field}.parameters")
    schema = compact(spec.parameters) if spec.parameters else ""
    return pb.Tool(name=spec.name, description=spec.description or "", parameters=schema)


def choice_of(choice: str, *, named: bool) -> pb.ToolChoice:
    """``choice`` is auto, none or required, or the name of the tool that must be called."""
    if named:
        return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NAMED, name=choice)
    return pb.ToolChoice(mode=_MODES[choice])


def check_answers(turn: pb.ChatMessage, called: Collection[str], field: str) -> None:
    """Raises ``InvalidRequest`` where ``turn`` is a tool's and answers none of the calls whose ids are ``called``."""
    if turn.role == "tool" and turn.tool_call_id not in called:
        raise InvalidRequest(f"{field} is {turn.tool_call_id[:64]!r}, which no call before it has", field=field)


class ArgumentsChecker:
    """Checks the arguments of a conversation's calls, whose elements are bounded together.

    They come as JSON in strings, where the count of the body's own elements does not reach.
    """

    def __init__(self) -> None:
        self._elements = ElementCounter()

    def text(self, arguments: str, field: str) -> str:
        """``arguments`` as they came; a JSON object. Raises ``InvalidRequest`` or ``TooLarge``."""
        data = arguments.encode() or b"{}"
        self._elements.feed(data)
        try:
            value = from_json(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise InvalidRequest(f"{field} is not a JSON object", field=field)
        return arguments or "{}"
