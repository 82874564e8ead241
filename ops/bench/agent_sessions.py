"""Recorded and generated sessions of coding agents, and the common prefixes of their prompts."""

from __future__ import annotations

import copy
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.api.http.chat_form import ChatForm
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.requests import Conversation
from cluster.model.tokenizer import Tokenizer

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
FORMS: dict[str, type[ChatForm | MessagesForm | ResponsesForm]] = {
    CHAT: ChatForm,
    MESSAGES: MessagesForm,
    RESPONSES: ResponsesForm,
}
ID_BYTES = 4
Json = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request of an agent: the route, and the body as the agent sent it."""

    path: str
    body: Json

    def prepared(self, salt: str, tokens: int) -> Ask:
        """Return the request as a greedy stream of up to ``tokens``, with ``salt`` before its first text."""
        body = copy.deepcopy(self.body)
        body |= {"model": "default", "stream": True, "temperature": 0}
        body.pop("max_completion_tokens", None)
        body["max_output_tokens" if self.path == RESPONSES else "max_tokens"] = tokens
        if self.path == CHAT:
            body["stream_options"] = {"include_usage": True}
        _add_salt(body, salt)
        return Ask(self.path, body)

    def conversation(self) -> Conversation:
        """Return the conversation as the server reads it. Raise InvalidRequest or ValueError if it refuses it."""
        form = FORMS[self.path].model_validate_json(json.dumps(self.body))
        return form.params("bench").conversation


def _add_salt(body: Json, salt: str) -> None:
    """Put ``salt`` before the first text of the prompt, so that it shares no prefix with prompts of another salt."""
    for name in ("system", "instructions"):
        if isinstance(body.get(name), str):
            body[name] = salt + body[name]
            return
    first = (body.get("system") or body.get("messages") or body["input"])[0]
    if isinstance(first.get("text"), str):
        first["text"] = salt + first["text"]
    elif isinstance(first["content"], str):
        first["content"] = salt + first["content"]
    else:
        first["content"][0]["text"] = salt + first["content"][0]["text"]


def recorded(file: Path) -> list[Ask]:
    """Read a recording: one line of JSON with ``path`` and ``body`` per request. Exit if it is invalid."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        asks = [Ask(line["path"].partition("?")[0], line["body"]) for line in lines]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(f"{file} is no recording of a session: {error!r}") from None
    known = [ask for ask in asks if ask.path in FORMS and isinstance(ask.body, dict)]
    if not known:
        raise SystemExit(f"{file} has no request for {', '.join(FORMS)}")
    return known


class Prompts:
    """The token ids of all prompts and answers of one key."""

    def __init__(self) -> None:
        self._known: list[bytes] = []

    def add(self, ids: Sequence[int]) -> None:
        self._known.append(_packed(ids))

    def reusable(self, ids: Sequence[int]) -> int:
        """Return the length of the longest prefix of ``ids`` that can be reused. The last token is always computed."""
        packed = _packed(ids)
        return min(max((_shared(packed, one) for one in self._known), default=0), len(ids) - 1)


def _packed(ids: Sequence[int]) -> bytes:
    return b"".join(i.to_bytes(ID_BYTES, "little") for i in ids)


def _shared(a: bytes, b: bytes) -> int:
    """Return the length of the common prefix of two packed sequences, in ids."""
    longest = min(len(a), len(b)) // ID_BYTES
    lengths = range(1, longest + 1)
    return bisect_left(lengths, True, key=lambda n: a[: n * ID_BYTES] != b[: n * ID_BYTES])


WORDS = re.findall(
    r"\w+",
    "stage worker layer prompt cache token model frame lane prefix chunk answer request cluster plan memory key value "
    "weight file test line error return import class path read write run list call message result",
)
TASKS = (
    "Find out why the test of the cache fails, and mend it.",
    "Now do the same for the other file, and run all tests.",
    "Explain what was wrong, then write a note for the next version.",
)
FILES = ("cluster/frames.py", "cluster/plan.py", "tests/test_frames.py", "ops/notes.md")
TOOLS = {
    "read_file": ("path",),
    "write_file": ("path", "content"),
    "search_text": ("pattern", "path"),
    "run_command": ("command", "timeout"),
    "list_folder": ("path",),
    "start_agent": ("task",),
}
THINKING, NO_THINKING = {"enable_thinking": True}, {"enable_thinking": False}
SYSTEM_WORDS, TOOL_WORDS, THOUGHT_WORDS = 600, 60, 30
STEPS = 12
"""Requests of a generated session."""
TASK_EVERY = STEPS // len(TASKS)
CALLS = [step for step in range(STEPS) if step % TASK_EVERY]
"""The requests of a session with tools that bring a result; the others bring a task."""


class Script:
    """Generates sessions. The same seed gives the same sessions.

    The last prompt has about ``tokens`` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(7)
        self._tools = [self._tool(name, fields) for name, fields in TOOLS.items()]
        self._system = "You are an agent that works on a project.\n" + self._text(SYSTEM_WORDS)
        sample = self._text(400)
        self._per_word = len(tokenizer.encode(sample)) / 400
        self._fixed = len(tokenizer.encode(self._system + json.dumps(self._tools)))
        self._words = max(STEPS, round((tokens - self._fixed) / self._per_word))
        """Prepare the words of all tool results."""

    def tool_session(self) -> Iterator[Ask]:
        """Yield the requests of an agent that thinks and calls tools, with a new task from time to time.

        The answers are not the model's own: calls are rendered again, and each new task drops the earlier thinking.
        """
        messages = self._opening()
        for step in range(STEPS):
            if step % TASK_EVERY == 0:
                messages.append({"role": "user", "content": TASKS[step // TASK_EVERY]})
            else:
                messages += self._call(step, self._result(step, CALLS))
            yield Ask(CHAT, {"messages": list(messages), "tools": self._tools, "chat_template_kwargs": THINKING})

    def chat_session(self, answer: Callable[[], str]) -> Iterator[Ask]:
        """Yield the requests of a chat with the model's own answers. ``answer`` returns the latest one."""
        messages = self._opening()
        bias = {str(i): 100 for i in self._word_ids()}
        for step in range(STEPS):
            shown = self._result(step + 1, range(1, STEPS + 1))
            messages.append({"role": "user", "content": f"{TASKS[step % len(TASKS)]}\n{shown}"})
            body = {"messages": list(messages), "tools": self._tools, "logit_bias": bias}
            yield Ask(CHAT, {**body, "chat_template_kwargs": NO_THINKING})
            messages.append({"role": "assistant", "content": answer()})

    def short_turns(self, tokens: int, turns: int) -> Iterator[Ask]:
        """Yield a request of about ``tokens``, then ``turns`` more. Each adds a call with a short result."""
        messages = [*self._opening(), {"role": "user", "content": f"{TASKS[0]}\n{self._filling(tokens)}"}]
        yield Ask(CHAT, {"messages": list(messages), "tools": self._tools, "chat_template_kwargs": THINKING})
        for turn in range(turns):
            messages += self._call(turn, self._text(THOUGHT_WORDS))
            yield Ask(CHAT, {"messages": list(messages), "tools": self._tools, "chat_template_kwargs": THINKING})

    def agents(self, count: int, tokens: int, turns: int) -> Iterator[list[Ask]]:
        """Yield the requests of ``count`` sub-agents, turn by turn. About ``tokens`` at their beginning are the same.

        Each later turn adds a call with a short result.
        """
        context = self._filling(tokens)
        parts = [f"{context}\nYour part is {FILES[i % len(FILES)]}, number {i}." for i in range(count)]
        histories = [[*self._opening(), {"role": "user", "content": part}] for part in parts]
        for turn in range(turns):
            yield [Ask(CHAT, {"messages": list(history), "tools": self._tools}) for history in histories]
            for history in histories:
                history += self._call(turn, self._text(THOUGHT_WORDS))

    def _opening(self) -> list[Json]:
        return [{"role": "system", "content": self._system}]

    def _filling(self, tokens: int) -> str:
        """Return a text that makes a prompt of about ``tokens`` with the system message and the tools."""
        return self._text(max(1, round((tokens - self._fixed) / self._per_word)))

    def _call(self, step: int, result: str) -> list[Json]:
        """Return an assistant's message with thinking and a call, and the message with its result."""
        identity, path = f"call_{step:06}", FILES[step % len(FILES)]
        function = {"name": "read_file", "arguments": json.dumps({"path": path}, separators=(",", ":"))}
        return [
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": self._text(THOUGHT_WORDS),
                "tool_calls": [{"id": identity, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": identity, "content": f"{path}\n{result}"},
        ]

    def _result(self, step: int, steps: Iterable[int]) -> str:
        """Return the result of ``step``, one of ``steps``: its part of the words of all results."""
        return self._text(round(self._words * step / sum(steps)))

    def _text(self, words: int) -> str:
        """Return a text of this many words, a dozen per line."""
        chosen = self._random.choices(WORDS, k=words)
        return "\n".join(" ".join(chosen[i : i + 12]) for i in range(0, words, 12))

    def _word_ids(self) -> list[int]:
        """Return the ids of tokens that are whole words. Texts of them encode to the same ids."""
        encoded = (self._tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS)
        return sorted({ids[0] for ids in encoded if len(ids) == 1})

    def _tool(self, name: str, fields: Sequence[str]) -> Json:
        properties = {f: {"type": "string", "description": self._text(TOOL_WORDS // 4)} for f in fields}
        schema = {"type": "object", "properties": properties, "required": list(fields)}
        described = {"name": name, "description": self._text(TOOL_WORDS), "parameters": schema}
        return {"type": "function", "function": described}
