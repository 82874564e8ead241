"""POST /v1/embeddings, and Ollama's /api/embed and /api/embeddings: a vector for each text.

An embedding is the hidden state of a text's last token, after the model's norm. So each text is a request like any
other, of which only the prompt is computed.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Final

from starlette.requests import Request

from cluster.api.http.body import build, charge_of, form_size, read
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.embeddings_form import EmbeddingsForm, OllamaEmbeddingsForm, OllamaEmbedForm
from cluster.api.http.json_response import Encoded, LongJson, encoded_list, new_id
from cluster.api.http.model_names import ModelNames
from cluster.api.http.ollama_models import known_name
from cluster.api.http.sse import while_connected
from cluster.api.limits import CONCURRENT_EMBEDDINGS
from cluster.api.request_service import RequestService
from cluster.api.request_validation import generate_request
from cluster.api.requests import Caller, GenerateParams, rename_fields
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, NotServing, StageFailed
from cluster.core.limits import MAX_COLLECTED_BYTES, MIB
from cluster.core.request import TokenEvent
from cluster.transport.byte_budget import Charge

ITEM_BYTES: Final = 4
HELD_BYTES: Final = 24
"""Bytes charged for each number of an embedding: its JSON, and Python's objects while it is made."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The routes' handlers."""

    service: RequestService
    names: ModelNames

    async def openai(self, request: Request) -> LongJson:
        """Answer in OpenAI's format. ``base64`` is little-endian float32."""
        form = await read(request, EmbeddingsForm)
        embedded = await self._embed(request, form, form.model, {"prompt": "input"}, form.dimensions)
        encode = _base64 if form.encoding_format == "base64" else _numbers
        data = [
            {"object": "embedding", "index": i, "embedding": encode(vector)}
            for i, vector in enumerate(embedded.vectors)
        ]
        usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        return LongJson({"object": "list", "data": data, "model": embedded.model, "usage": usage})

    async def ollama(self, request: Request) -> LongJson:
        """Answer /api/embed."""
        began = time.monotonic_ns()
        form = await read(request, OllamaEmbedForm)
        requested = known_name(self.names, form.model)
        embedded = await self._embed(request, form, requested, {"prompt": "input"}, form.dimensions)
        return LongJson(
            {
                "model": embedded.model,
                "embeddings": [_numbers(vector) for vector in embedded.vectors],
                "total_duration": time.monotonic_ns() - began,
                "load_duration": embedded.load_ns,
                "prompt_eval_count": embedded.tokens,
            }
        )

    async def ollama_single(self, request: Request) -> LongJson:
        """Answer /api/embeddings."""
        form = await read(request, OllamaEmbeddingsForm)
        embedded = await self._embed(request, form, known_name(self.names, form.model), {})
        return LongJson({"embedding": _numbers(embedded.vectors[0])})

    async def _embed(
        self,
        request: Request,
        form: EmbeddingsForm | OllamaEmbedForm | OllamaEmbeddingsForm,
        requested: str | None,
        fields: Mapping[str, str],
        dimensions: int | None = None,
    ) -> Embedded:
        """Return the embeddings of a form's texts. Wait for the model if it is not loaded; the first error ends all.

        ``fields`` maps parameters to the form's fields. Raises ``InvalidRequest`` for a model that makes none,
        ``NotServing`` if only a fallback could, and as ``ModelNames.hold``.
        """
        params = await build(request, lambda: form.params(new_id("embd-")))
        caller, size, charge = caller_of(request, 1), form_size(request), charge_of(request)

        async def embed() -> Embedded:
            began = time.monotonic_ns()
            async with self.names.hold(requested, self.names.load_wait_s) as held:
                load_ns, model_info = time.monotonic_ns() - began, held.model_info
                if held.fallback:
                    raise NotServing(
                        f"the model cannot be served now, and embeddings of its fallback {held.fallback} would not be "
                        "comparable with those of the model; try again later"
                    )
                if model_info.embedding.problem:
                    raise InvalidRequest(model_info.embedding.problem, field="model")
                vectors, tokens = await _Texts(self.service, model_info, caller, size, charge, dimensions).embed(params)
                return Embedded(vectors, tokens, self.names.shown_name(requested, model_info), load_ns)

        with rename_fields(fields):
            return await while_connected(request, embed)


@dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings in the order of their texts, the tokens of all texts, and the name of the model.

    ``load_ns`` is how long the request waited for the model.
    """

    vectors: Sequence[Sequence[float]]
    tokens: int
    model: str
    load_ns: int


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of one request."""

    service: RequestService
    model_info: ModelInfo
    caller: Caller
    size: int
    charge: Charge
    dimensions: int | None

    async def embed(self, params: Sequence[GenerateParams]) -> tuple[list[Sequence[float]], int]:
        """Return the embeddings of all texts, at most ``CONCURRENT_EMBEDDINGS`` at a time, and the texts' tokens.

        Raises the first error, which ends all.
        """
        waiting = list(enumerate(params))[::-1]
        found: dict[int, tuple[Sequence[float], int]] = {}

        async def work() -> None:
            while waiting:
                i, one = waiting.pop()
                found[i] = await self._embed(one)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(CONCURRENT_EMBEDDINGS, len(params))):
                    tasks.create_task(work())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        results = [found[i] for i in range(len(params))]
        return [vector for vector, _ in results], sum(tokens for _, tokens in results)

    async def _embed(self, params: GenerateParams) -> tuple[Sequence[float], int]:
        """Return the embedding of one text, and its tokens."""
        prepared = await generate_request(params, self.size, self.model_info, self.caller)
        running = await self.service.submit(prepared.request, self.model_info)
        state = b""
        async with aclosing(running.events) as events:
            async for event in events:
                state = event.state if isinstance(event, TokenEvent) else state
        if not state:
            raise StageFailed("the last stage returned no hidden state; this model's code does not let macpipe take it")
        self._charge(len(state) // ITEM_BYTES)
        vector = struct.unpack(f"<{len(state) // ITEM_BYTES}f", state)
        return shorten(vector, self.dimensions, normalized=self.model_info.embedding.normalized), len(
            running.request.prompt
        )

    def _charge(self, count: int) -> None:
        if self.charge.size + count * HELD_BYTES > MAX_COLLECTED_BYTES:
            raise InvalidRequest(
                f"the embeddings need more than {MAX_COLLECTED_BYTES // MIB} MiB; send fewer texts at a time",
                field="input",
            )
        self.charge.add(count * HELD_BYTES)


def shorten(vector: Sequence[float], dimensions: int | None, *, normalized: bool) -> Sequence[float]:
    """Return the first ``dimensions`` numbers of a hidden state, with length 1 if ``normalized``.

    Raises ``InvalidRequest`` if there are not as many, and ``StageFailed`` if a number is not finite.
    """
    if dimensions is not None and dimensions > len(vector):
        raise InvalidRequest(
            f"dimensions is {dimensions}, but the model's embeddings have {len(vector)}", field="dimensions"
        )
    chosen = vector[:dimensions]
    length = sqrt(sum(number * number for number in chosen))
    if not isfinite(length):
        raise StageFailed("the model's hidden state is not finite")
    return tuple(number / length for number in chosen) if normalized and length else chosen


def _numbers(vector: Sequence[float]) -> Encoded:
    """Return a vector as JSON. Nine digits tell every float32."""
    return encoded_list(f"{number:.9g}" for number in vector)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
