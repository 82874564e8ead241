"""Builds the grammar of an answer that must call a tool, in the model's own call format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatOptions, Grammar, GrammarKind, Tool, ToolChoice
from cluster.model.chat_template import describe_tool
from cluster.model.grammars import JSON_STYLE
from cluster.model.output_markers import OutputMarkers, quote_lark
from cluster.model.schema_support import find_unenforced

__all__ = ["tool_call_grammar"]


def tool_call_grammar(options: ChatOptions, markers: OutputMarkers) -> Grammar | None:
    """Return the grammar of an answer that must call a tool; see ``Tokenizer.required_call_grammar``."""
    if options.tool_choice not in (ToolChoice.REQUIRED, ToolChoice.NAMED):
        return None
    tools = [t for t in options.tools if options.tool_choice is ToolChoice.REQUIRED or t.name == options.tool_name]
    if not tools:
        wanted = f"the tool {options.tool_name[:64]!r}" if options.tool_choice is ToolChoice.NAMED else "a tool"
        raise InvalidRequest(f"tool_choice requires {wanted}, which is not among the tools", field="tool_choice")
    write = WRITERS.get(markers.format)
    if write is None:
        raise InvalidRequest(
            "macpipe has no grammar for this model's tool call format; use tool_choice auto",
            field="tool_choice",
        )
    return Grammar(GrammarKind.LARK, write(tools, markers, options.parallel_tool_calls))


def _json_tools(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    r"""Return the grammar of ``<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>``, once or more often."""
    start, end = markers.to_lark(markers.call_start), markers.to_lark(markers.call_end)
    again = ' ("\\n"? call)*' if several else ""
    return "\n".join(
        (
            f"start: call{again}",
            f'call: {start} "\\n"? body "\\n"? {end}',
            f"body: {_json({'anyOf': [_call_schema(tool) for tool in tools]})}",
        )
    )


def _mistral(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of ``[TOOL_CALLS]name[ARGS]{...}``, once or more often."""
    head, middle = markers.to_lark(markers.call_start), markers.to_lark("[ARGS]")
    rules = [
        f"tool_{i}: {head} {quote_lark(tool.name)} {middle} {_json(_parameters(tool))}" for i, tool in enumerate(tools)
    ]
    return "\n".join((_start(len(tools), several), *rules))


def _kimi_k2(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of Kimi K2's calls, once or more often.

    A call is ``functions.name:0<|tool_call_argument_begin|>{...}`` between markers; a section with markers holds all.
    """
    start, end = markers.to_lark(markers.call_start), markers.to_lark(markers.call_end)
    begin, middle, close = map(
        markers.to_lark, ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    )
    rules = [
        f"tool_{i}: {begin} {quote_lark(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {middle} "
        f"{_json(_parameters(tool))} {close}"
        for i, tool in enumerate(tools)
    ]
    calls = _start(len(tools), several).removeprefix("start: ")
    return "\n".join((f"start: {start} {calls} {end}", *rules))


def _harmony(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of one harmony call. There is never a second one, since a call ends the answer."""
    head, middle = (
        markers.to_lark("<|channel|>commentary to=functions."),
        markers.to_lark("<|constrain|>json<|message|>"),
    )
    rules = [
        f"tool_{i}: {head} {quote_lark(tool.name + ' ')} {middle} {_json(_parameters(tool))}"
        for i, tool in enumerate(tools)
    ]
    return "\n".join((_start(len(tools), False), *rules))


def _deepseek(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of ``NAME<sep>{...}`` between markers, once or more often."""
    return _deepseek_calls(tools, markers, several, "", "")


def _deepseek_blocks(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of ``function<sep>NAME`` and a block of JSON code between markers, once or more often."""
    return _deepseek_calls(tools, markers, several, "\n```json\n", "\n```")


def _deepseek_calls(tools: Sequence[Tool], markers: OutputMarkers, several: bool, opening: str, closing: str) -> str:
    begin, close = markers.to_lark("<｜tool▁calls▁begin｜>"), markers.to_lark("<｜tool▁calls▁end｜>")
    separator = markers.to_lark("<｜tool▁sep｜>")
    start, end = markers.to_lark(markers.call_start), markers.to_lark(markers.call_end)
    rules = []
    for i, tool in enumerate(tools):
        name = quote_lark(tool.name + opening)
        head = f'"function" {separator} {name}' if opening else f"{name} {separator}"
        tail = quote_lark(closing) if closing else ""
        rules.append(f"tool_{i}: {start} {head} {_json(_parameters(tool))} {tail} {end}")
    calls = _start(len(tools), several).removeprefix("start: ")
    return "\n".join((f"start: {begin} {calls} {close}", *rules))


def _llama3(tools: Sequence[Tool], markers: OutputMarkers, several: bool) -> str:
    """Return the grammar of one ``{"name": ..., "parameters": {...}}``, the only call that Llama 3 makes at a time."""
    schema = {"anyOf": [_call_schema(tool, "parameters") for tool in tools]}
    return f"start: {_json(schema)}"


WRITERS: Final[Mapping[str, Callable[[Sequence[Tool], OutputMarkers, bool], str]]] = MappingProxyType(
    {
        "json_tools": _json_tools,
        "mistral": _mistral,
        "kimi_k2": _kimi_k2,
        "harmony": _harmony,
        "deepseek": _deepseek,
        "deepseek_blocks": _deepseek_blocks,
        "llama3": _llama3,
    }
)
"""Writers by the name of the format, mlx-lm's or that of ``call_formats``.

A JSON schema cannot describe the arguments of the other formats."""


def _start(tools: int, several: bool) -> str:
    return f"start: ({' | '.join(f'tool_{i}' for i in range(tools))}){'+' if several else ''}"


def _json(schema: dict[str, Any]) -> str:
    """Return a Lark expression for a document of ``schema``, with the layout rules of ``JSON_STYLE``."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def _parameters(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are always an object, even if the schema does not say so."""
    parameters = describe_tool(tool)["function"]["parameters"]
    if why := find_unenforced(parameters):
        raise InvalidRequest(f"the parameters of the tool {tool.name} cannot be enforced: {why}", field="tools")
    return {**parameters, "type": "object"}


def _call_schema(tool: Tool, arguments: str = "arguments") -> dict[str, Any]:
    properties = {"name": {"const": tool.name}, arguments: _parameters(tool)}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", arguments],
        "additionalProperties": False,
    }
