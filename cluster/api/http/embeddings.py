"""POST /v1/embeddings, and Ollama's /api/embed and /api/embeddings: a vector for each text."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from cluster.api.embeddings import TextEmbedder
from cluster.api.http.body import build, charge_of, form_size, read
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.embeddings_form import EmbeddingsForm, OllamaEmbeddingsForm, OllamaEmbedForm
from cluster.api.http.json_response import Encoded, LongJson, encoded_list, new_id
from cluster.api.http.model_names import ModelNames
from cluster.api.http.ollama_models import known_name
from cluster.api.http.sse import while_connected
from cluster.api.request_service import RequestService
from cluster.api.requests import rename_fields


@dataclass(frozen=True, slots=True)
class EmbeddingRoutes:
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
                embedder = TextEmbedder.of(self.service, held, caller, size, charge, dimensions)
                vectors, tokens = await embedder.embed(params)
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


def _numbers(vector: Sequence[float]) -> Encoded:
    """Return a vector as JSON. Nine digits tell every float32."""
    return encoded_list(f"{number:.9g}" for number in vector)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
