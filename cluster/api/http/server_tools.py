"""Tools that OpenAI's or Anthropic's own servers run, such as a web search. They are left out of the prompt."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from cluster.api.http.body import UNKNOWN_TOOL, Form, ShortText, note_ignored

MAX_SHOWN_CHARS: Final = 64
_TYPES: Final = re.compile(
    r"web_search(_preview)?|web_fetch|file_search|code_interpreter|code_execution|image_generation|namespace|tool_search"
    r"|tool_search_tool_(regex|bm25)|mcp|mcp_toolset|advisor"
)
_DATE: Final = re.compile(r"_\d{8}|_\d{4}_\d\d_\d\d")
"""The date of a tool's version, at the end of its type."""


_CLIENT_TYPES: Final = ("function", "custom")
"""The types of tools that come with a schema. Other forms read them."""


def _check_type(kind: str, info: ValidationInfo) -> str:
    if kind in _CLIENT_TYPES:
        raise PydanticCustomError("server_tool", "is not a tool that a server runs")
    if not _TYPES.fullmatch(_DATE.sub("", kind)):
        raise PydanticCustomError(
            UNKNOWN_TOOL,
            "{kind} is not supported, because only the API's own models know its schema; define the tool with a name "
            "and a schema instead",
            {"kind": kind[:MAX_SHOWN_CHARS]},
        )
    note_ignored(info, f"tools.{kind}")
    return kind


class ServerTool(Form):
    """A tool that the API's own server would have to run. Its settings are not read.

    Tools that the client runs but whose schema only the API's own models know have other types, which are rejected.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Annotated[ShortText, AfterValidator(_check_type)]
