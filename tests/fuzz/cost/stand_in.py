"""A coordinator and a worker that parse and check an input as usual and then answer that they are busy."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import Busy, MacpipeError, RequestNotFound
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import MAX_SCHEMA_BYTES
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Request, Tool, ToolCall
from cluster.model.checkpoint import BUNDLED
from cluster.model.tokenizer import load_tokenizer
from cluster.sandbox.sandboxed_tokenizer import SandboxedTokenizer, TextService, Tokenized
from fuzz.cost.target import SANDBOX_CLOSED, TAKEN
from fuzz.targets.asked import served as plain_model
from fuzz.targets.kept import scratch
from workerless import WorkerlessCoordinator

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
    """The input passed every check."""


class NeedsSandbox(Busy):
    """The input reached tokenizing or compiling, and no sandbox is open."""


class Coordinator(WorkerlessCoordinator):
    """Checks a request's grammar as the real one does, and then stops."""

    def served_model(self, name: str, adapter: str = "") -> ModelInfo:
        return served()

    async def check_grammar(self, grammar: Grammar, model_info: ModelInfo) -> None:
        await model_info.check_grammar(grammar, MAX_SCHEMA_BYTES)

    async def accept(self, request: Request, model_info: ModelInfo) -> NoReturn:
        if request.sampling.grammar:
            await self.check_grammar(request.sampling.grammar, model_info)
        raise Passed(PASSED)

    def resume(self, request_id: str, known: tuple[KnownTokens, ...], client: str) -> NoReturn:
        raise RequestNotFound(f"no request has the id {request_id[:64]}")

    async def abort(self, request_id: str) -> NoReturn:
        raise RequestNotFound(f"no request has the id {request_id[:64]}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def busy(*given: object, **named: object) -> NoReturn:
            raise Passed(PASSED)

        return busy


def request_service() -> RequestService:
    """The real service, over the stand-in."""
    served()
    return RequestService(Coordinator(), Metrics())  # type: ignore[arg-type]


_callers = itertools.count()


class Context:
    """Of a gRPC call: what handlers ask of it. Each is another client's. A call that is aborted raises its error."""

    def __init__(self) -> None:
        self._peer = f"ipv4:10.0.0.{next(_callers)}:5"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return self._peer

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        raise Aborted(code, details, trailing_metadata)


class Aborted(Exception):
    """A call that ended with a status."""

    def __init__(self, code: Any, details: str, metadata: Any) -> None:
        super().__init__(details)
        self.code, self.details, self.metadata = code, details, metadata


def outcome_of(error: MacpipeError) -> str:
    """Return the outcome of a typed error: SANDBOX_CLOSED, TAKEN, or its name."""
    if isinstance(error, NeedsSandbox):
        return SANDBOX_CLOSED
    return TAKEN if isinstance(error, Passed) else type(error).__name__


@functools.cache
def model_folder() -> Path:
    """Return the folder of the small model, with a template that takes tools."""
    folder = scratch("tools")
    shutil.copytree(BUNDLED / "faq", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tool_parser_type": "json_tools"}))
    return folder


class LateSandbox(TextService):
    """The real sandbox once it is open, which takes a second. Before, every call raises ``NeedsSandbox``."""

    def __init__(self) -> None:
        self._text: SandboxedTokenizer | None = None

    async def open(self) -> None:
        """Start the processes for prompts and for grammars. They end with this process."""
        text = SandboxedTokenizer(model_folder())
        await text.open()
        await text.check_grammar(Grammar(GrammarKind.REGEX, "a"))
        self._text = text

    async def encode(self, text: str, max_tokens: int, *, texts: bool = False, special: bool = True) -> Tokenized:
        return await self._opened().encode(text, max_tokens, texts=texts, special=special)

    async def converse(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        grammar: Grammar | None,
        max_tokens: int,
        *,
        texts: bool = False,
        owner: str = "",
    ) -> Tokenized:
        return await self._opened().converse(messages, options, grammar, max_tokens, texts=texts, owner=owner)

    async def check_grammar(self, grammar: Grammar) -> None:
        await self._opened().check_grammar(grammar)

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        return await self._opened().read_calls(body, tools)

    async def close(self) -> None:
        """End the processes. The next event loop needs others."""
        if self._text:
            await self._text.close()
        self._text = None

    def _opened(self) -> SandboxedTokenizer:
        if self._text is None:
            raise NeedsSandbox(SANDBOX_CLOSED)
        return self._text


SANDBOX = LateSandbox()
"""One for each process: measurements are forks."""


@functools.cache
def served() -> ModelInfo:
    """Return the same model as a coordinator knows it, with a context that every prompt fits."""
    plain = plain_model()
    shape = replace(plain.shape, max_context=LONG_CONTEXT)
    return ModelInfo(shape, load_tokenizer(model_folder()), plain.tensors, plain.found, SANDBOX, speculates=True)
