"""Streams byte for byte, except ids and times: clients in other languages parse them by hand.

To change a transcript, delete its file and run this once, which writes it again.
"""

from __future__ import annotations

import json
import re
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

GOLDEN = Path(__file__).parent / "golden"
TURN = [{"role": "user", "content": "What is a hop?"}]
SHORT = {"temperature": 0, "max_tokens": 4, "stream": True}
OPTIONS = {"temperature": 0, "num_predict": 4}
TOOL = {"name": "lamp", "description": "", "parameters": {"type": "object", "properties": {"on": {"enum": [True]}},
        "required": ["on"], "additionalProperties": False}}  # fmt: skip
THOUGHT = {"type": "lark", "lark": 'start: <[263]> "hm" <[264]> "ok"'}

FAQ: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": TURN, **SHORT, "stream_options": {"include_usage": True}}),
    "chat_error": ("/v1/chat/completions", {"messages": TURN, "stream": True, "top_k": -2}),
    "completions": ("/v1/completions", {"prompt": "A hop is", **SHORT}),
    "responses": (
        "/v1/responses",
        {"input": "What is a hop?", "temperature": 0, "max_output_tokens": 4, "stream": True},
    ),
    "messages": ("/v1/messages", {"model": "faq", "messages": TURN, **SHORT}),
    "messages_error": ("/v1/messages", {"model": "faq", "messages": TURN, "stream": True}),
    "ollama_chat": ("/api/chat", {"model": "faq", "messages": TURN, "options": OPTIONS}),
    "ollama_generate": ("/api/generate", {"model": "faq", "prompt": "A hop is", "raw": True, "options": OPTIONS}),
    "ollama_error": ("/api/chat", {"model": "faq", "messages": TURN, "options": {"top_k": -2}}),
}
TOOLED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat_tool": (
        "/v1/chat/completions",
        {"messages": TURN, "temperature": 0, "stream": True, "tools": [{"type": "function", "function": TOOL}],
         "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "chat_reasoning": ("/v1/chat/completions", {"messages": TURN, "stream": True, "response_format": THOUGHT}),
    "responses_tool": (
        "/v1/responses",
        {"input": "x", "temperature": 0, "stream": True, "tools": [{"type": "function", **TOOL}],
         "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "messages_tool": (
        "/v1/messages",
        {"model": "default", "messages": TURN, "max_tokens": 200, "stream": True, "temperature": 0,
         "tools": [{"name": "lamp", "input_schema": TOOL["parameters"]}],
         "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
    ),
}  # fmt: skip


def transcript(served: Served, path: str, body: dict[str, Any]) -> str:
    connection = HTTPConnection(served.http.removeprefix("http://"), timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **served.bearer})
    reply = connection.getresponse()
    said = reply.read().decode()
    connection.close()
    kind = reply.headers["content-type"]
    return f"{reply.status} {kind}\n\n{anonymous(said)}"


def anonymous(said: str) -> str:
    """Without what differs each time: ids, times, lengths, and what was kept of the prompt."""
    said = re.sub(r'"(chatcmpl-|cmpl-|resp_|msg_|rs_|fc_|call_)[0-9a-f]{24}"', r'"\1ID"', said)
    said = re.sub(r'"(created|created_at)":\d+', r'"\1":0', said)
    said = re.sub(r'"output_tokens":\d+', '"output_tokens":0', said)
    said = re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', said)
    said = re.sub(r'"created_at":"[0-9T:.-]+Z"', '"created_at":"TIME"', said)
    said = re.sub(r'"(total|load|eval|prompt_eval)_duration":\d+', r'"\1_duration":0', said)
    kept = r'"input_tokens":\d+,"cache_creation_input_tokens":0,"cache_read_input_tokens":\d+'
    said = re.sub(kept, '"input_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":0', said)
    return re.sub(r'"model":"tooled0?"', '"model":"tooled"', said)


def compare(name: str, said: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if not file.exists():
        file.write_text(said)
        pytest.fail(f"{file.name} was not there; it was written now: read it, and keep it")
    assert said == file.read_text()


@pytest.mark.parametrize("name", FAQ)
def test_a_stream_of_words(faq: Served, name: str) -> None:
    compare(name, transcript(faq, *FAQ[name]))


@pytest.mark.parametrize("name", TOOLED)
def test_a_stream_of_calls_or_thoughts(tooled: Served, name: str) -> None:
    compare(name, transcript(tooled, *TOOLED[name]))
