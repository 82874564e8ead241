"""Sends an agent's request to macpipe or mlx_lm.server as an HTTP stream, and measures the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from agent_sessions import CHAT, Ask, Json
from mlx_server import NAME

from cluster.api.requests import Conversation
from cluster.core.request import ChatMessage

TIMEOUT_S = 600


class Refused(Exception):
    """The server answered with an error; the message has its status and text."""


@dataclass(frozen=True)
class Answer:
    """The cost of one request. Times are in seconds after sending it; ``text`` is the content of the answer."""

    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    text: str


def send(port: int, ask: Ask) -> Answer:
    """Send the request and read its whole answer. Raises Refused, also for a stream that ends with an error."""
    body = json.dumps(ask.body)
    headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
    with closing(HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection:
        began = time.perf_counter()
        connection.request("POST", ask.path, body, headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise Refused(f"{reply.status} {reply.read(2000).decode(errors='replace')}")
        first, text, usage = 0.0, "", Usage()
        for event in _events(reply):
            if "error" in event or event.get("type") == "response.failed":
                raise Refused(json.dumps(event)[:2000])
            if not first and _begins_answer(event):
                first = time.perf_counter() - began
            text += _content(event)
            usage.read(event)
        total = time.perf_counter() - began
    return Answer(first or total, total, usage.prompt, usage.cached, usage.answer, text)


class Usage:
    """The token counts of a stream, in the format of any of the three routes."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.answer = 0

    def read(self, event: Json) -> None:
        """Add the token counts of this event, if it has any."""
        inner = event.get("response") or event.get("message") or {}
        usage = event.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
        if not usage:
            return
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        cached = details.get("cached_tokens") or usage.get("cache_read_input_tokens") or 0
        if "prompt_tokens" in usage:
            self.prompt, self.answer = usage["prompt_tokens"], usage["completion_tokens"]
        elif "cache_read_input_tokens" in usage and usage.get("input_tokens") is not None:
            self.prompt = usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)
            self.answer = usage.get("output_tokens") or self.answer
        else:
            self.prompt = usage.get("input_tokens") or self.prompt
            self.answer = usage.get("output_tokens") or self.answer
        self.cached = cached or self.cached


def _events(reply: Any) -> Iterator[Json]:
    """Yield the JSON objects of a stream of server-sent events."""
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _begins_answer(event: Json) -> bool:
    """Return whether the event has text, reasoning or a call, or ends the answer."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("finish_reason") or any(delta.get(n) for n in ("content", "reasoning", "tool_calls")):
            return True
        if delta.get("reasoning_content"):
            return True
    kind = str(event.get("type", ""))
    return kind.endswith(("_delta", ".delta")) or kind in ("response.completed", "response.incomplete")


def _content(event: Json) -> str:
    """Return the text that a chunk of a chat completion adds to the answer's content."""
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in event.get("choices") or ())


def as_chat(ask: Ask, conversation: Conversation) -> Ask:
    """Return the same conversation as a chat completion for mlx_lm.server, which has no other route with messages."""
    options = conversation.options
    body: Json = {
        "model": NAME,
        "messages": [_message(m) for m in conversation.messages],
        "tools": [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": json.loads(t.parameters)},
            }
            for t in options.offered
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": ask.body.get("max_tokens") or ask.body.get("max_output_tokens"),
    }
    if "logit_bias" in ask.body:
        body["logit_bias"] = ask.body["logit_bias"]
    if options.enable_thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": options.enable_thinking}
    return Ask(CHAT, body)


def _message(message: ChatMessage) -> Json:
    written: Json = {"role": message.role, "content": message.content}
    if message.reasoning:
        written |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
    if message.tool_calls:
        written["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments or "{}"}}
            for c in message.tool_calls
        ]
    if message.tool_call_id:
        written["tool_call_id"] = message.tool_call_id
    if message.name:
        written["name"] = message.name
    return written
