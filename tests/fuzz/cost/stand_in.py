"""A coordinator and a worker up to where an input has been read and checked: there each says that it is busy."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cluster.api.desk import Desk
from cluster.api.metrics import Metrics
from cluster.coordinator.checkpoint import Checkpoint
from cluster.coordinator.grammars import GrammarCheck
from cluster.errors import Busy, MacpipeError, RequestNotFound
from cluster.grammar import Grammar
from cluster.limits import MAX_SCHEMA_BYTES
from cluster.model.checkpoint import BUNDLED
from cluster.model.tokenizer import load_tokenizer
from cluster.types import Request
from fuzz.targets.asked import served as plain_model
from fuzz.targets.kept import scratch

TEMPLATE = """
{%- if tools %}<|system|>You may call these functions: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|end|>{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}<|assistant|>{{ message.content | trim }}
{%- for tool_call in message.tool_calls or [] %}
<tool_call>{"name": "{{ tool_call.function.name }}",
 "arguments": {{ tool_call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|end|>
{%- elif message.role == "tool" %}<|user|><tool_response>{{ message.content }}</tool_response><|end|>
{%- else %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""In the manner of the templates of the large models' that call tools."""
LONG_CONTEXT = 8 << 20
PASSED = "the stand-in takes nothing"


class Passed(Busy):
    """The input came through every check."""


class Coordinator:
    """Checks a request's grammar as the real one does, and goes no further."""

    journal = None

    def __init__(self) -> None:
        self._grammars = GrammarCheck(MAX_SCHEMA_BYTES)

    def checkpoint(self, name: str) -> Checkpoint:
        return served()

    async def under_way(self) -> tuple[None, None]:
        return None, None

    async def check_grammar(self, grammar: Grammar, checkpoint: Checkpoint) -> None:
        await self._grammars.check(grammar, checkpoint)

    async def accept(self, request: Request, checkpoint: Checkpoint) -> NoReturn:
        if request.sampling.grammar:
            await self.check_grammar(request.sampling.grammar, checkpoint)
        raise Passed(PASSED)

    def resume(self, request_id: str, offsets: tuple[int, ...], client: str) -> NoReturn:
        raise RequestNotFound(f"no request has the id {request_id[:64]}")

    async def abort(self, request_id: str) -> NoReturn:
        raise RequestNotFound(f"no request has the id {request_id[:64]}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def busy(*given: object, **named: object) -> NoReturn:
            raise Passed(PASSED)

        return busy


def desk() -> Desk:
    """The real desk, over the stand-in; the model's tokenizer and its compiler of grammars are ready."""
    served().tokenizer.grammars()
    return Desk(Coordinator(), Metrics())  # type: ignore[arg-type]


class Context:
    """Of a gRPC call: what handlers ask of it. A call that is aborted raises its error."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        raise Aborted(code, details, trailing_metadata)


class Aborted(Exception):
    """A call ended with a status."""

    def __init__(self, code: Any, details: str, metadata: Any) -> None:
        super().__init__(details)
        self.code, self.details, self.metadata = code, details, metadata


def outcome_of(error: MacpipeError) -> str:
    """A typed error's name."""
    return type(error).__name__


@functools.cache
def model_folder() -> Path:
    """The small model, but with a template that takes tools."""
    folder = scratch("tools")
    shutil.copytree(BUNDLED / "faq", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tool_parser_type": "json_tools"}))
    return folder


@functools.cache
def served() -> Checkpoint:
    """The same, as a coordinator knows it, with a context that every prompt fits."""
    plain = plain_model()
    shape = replace(plain.shape, max_context=LONG_CONTEXT)
    return Checkpoint(shape, load_tokenizer(model_folder()), plain.tensors, plain.found)
