"""Knows the tool call formats that mlx-lm has no parser for: gpt-oss's harmony, DeepSeek's and Llama 3's.

Each format is chosen by words that only its templates contain. Its parser takes the text of one or more calls without
the markers around it, as mlx-lm's parsers do, and raises ValueError if there is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CallFormat", "find_call_format"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A format of tool calls.

    ``words`` must all be in the chat template. ``start`` and ``end`` surround calls; an empty ``end`` means that calls
    last until the answer ends. ``noise`` are markers without content. ``think`` are the markers of the reasoning, if
    mlx-lm does not know them. An answer to a person starts with ``content``, if the format marks that.
    """

    name: str
    words: tuple[str, ...]
    start: str
    end: str
    parse: Callable[[str, Any], Any]
    noise: tuple[str, ...] = ()
    think: tuple[str, str] = ("", "")
    content: str = ""


def find_call_format(template: str) -> CallFormat | None:
    """Return the format of a chat template's calls; None if it is none of these."""
    return next((one for one in FORMATS if all(word in template for word in one.words)), None)


def _parse_harmony(text: str, tools: Any = None) -> dict[str, Any]:
    """Parse ``NAME ... <|message|>{...}``: between the name and the message stand a channel and the content's type."""
    head, message, arguments = text.partition("<|message|>")
    name = re.match(r"[\w.-]+", head)
    if not message or not name:
        raise ValueError("not a harmony call")
    return {"name": name.group(), "arguments": _object(arguments)}


def _parse_deepseek(text: str, tools: Any = None) -> dict[str, Any]:
    """Parse ``NAME<sep>{...}``, or the older ``function<sep>NAME`` with the arguments in a block of JSON code."""
    head, separator, rest = text.partition("<｜tool▁sep｜>")
    if not separator:
        raise ValueError("not a DeepSeek call")
    block = re.fullmatch(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", rest, re.DOTALL)
    name, arguments = block.groups() if block else (head.strip(), rest)
    return {"name": name, "arguments": _object(arguments)}


LLAMA_START: Final = '{"name":'


def _parse_llama(text: str, tools: Any = None) -> list[dict[str, Any]]:
    """Parse ``{"name": ..., "parameters": {...}}``, several of which are separated by ``;``. The start is missing."""
    decoder = json.JSONDecoder()
    text = LLAMA_START + text
    calls: list[dict[str, Any]] = []
    at = 0
    while at < len(text):
        call, at = decoder.raw_decode(text, at)
        if not isinstance(call, dict):
            raise ValueError("not a Llama call")
        calls.append({"name": call["name"], "arguments": call.get("parameters", call.get("arguments"))})
        rest = re.compile(r"[\s;]*").match(text, at)
        at = rest.end() if rest else at
    return calls


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("arguments must be an object")
    return value


DEEPSEEK: Final[dict[str, Any]] = {
    "start": "<｜tool▁call▁begin｜>",
    "end": "<｜tool▁call▁end｜>",
    "parse": _parse_deepseek,
    "noise": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
}
FORMATS: Final[Sequence[CallFormat]] = (
    CallFormat(
        "harmony",
        ("<|channel|>", "<|message|>", "functions."),
        start=" to=functions.",
        end="<|call|>",
        parse=_parse_harmony,
        noise=(
            "<|start|>assistant",
            "<|channel|>final",
            "<|channel|>commentary",
            "<|constrain|>json",
            "<|message|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ),
        think=("<|channel|>analysis<|message|>", "<|end|>"),
        content="<|channel|>final<|message|>",
    ),
    CallFormat("deepseek_blocks", ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json"), **DEEPSEEK),
    CallFormat("deepseek", ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"), **DEEPSEEK),
    CallFormat(
        "llama3",
        ("<|start_header_id|>", '"parameters"'),
        start=LLAMA_START,
        end="",
        parse=_parse_llama,
        noise=("<|python_tag|>",),
    ),
)
