"""Make an embedding of each text of a request, for HTTP and gRPC.

An embedding is the hidden state of a text's last token, after the model's norm. So each text is a request like any
other, of which only the prompt is computed.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Final, Self

from cluster.api.limits import CONCURRENT_EMBEDDINGS
from cluster.api.request_service import RequestService
from cluster.api.request_validation import generate_request
from cluster.api.requests import Caller, GenerateParams, SamplingOptions
from cluster.coordinator.model_host import HeldModel
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, NotServing, StageFailed
from cluster.core.limits import MAX_COLLECTED_BYTES, MIB
from cluster.core.request import TokenEvent
from cluster.transport.byte_budget import Charge

ITEM_BYTES: Final = 4
HELD_BYTES: Final = 24
"""Bytes charged for each number of an embedding: its JSON, and Python's objects while it is made."""
_GREEDY: Final = SamplingOptions(temperature=0.0)


def embedding_params(request_id: str, inputs: Sequence[str | Sequence[int]]) -> list[GenerateParams]:
    """Return the parameters of the embedding of each input."""
    return [
        GenerateParams(
            request_id=f"{request_id}-{i}",
            prompt=one,
            sampling=_GREEDY,
            max_tokens=1,
            ignore_eos=True,
            speculate=False,
            embeds=True,
        )
        for i, one in enumerate(inputs)
    ]


@dataclass(frozen=True, slots=True)
class TextEmbedder:
    """Embeds the texts of one request, and holds their numbers within its ``charge``."""

    service: RequestService
    model_info: ModelInfo
    caller: Caller
    size: int
    charge: Charge
    dimensions: int | None

    @classmethod
    def of(
        cls,
        service: RequestService,
        held: HeldModel,
        caller: Caller,
        size: int,
        charge: Charge,
        dimensions: int | None,
    ) -> Self:
        """Return what embeds with a model that stays loaded.

        Raises ``NotServing`` if only a fallback does, and ``InvalidRequest`` for a model that makes no embeddings.
        """
        if held.fallback:
            raise NotServing(
                f"the model cannot be served now, and embeddings of its fallback {held.fallback} would not be "
                "comparable with those of the model; try again later"
            )
        if held.model_info.embedding.problem:
            raise InvalidRequest(held.model_info.embedding.problem, field="model")
        return cls(service, held.model_info, caller, size, charge, dimensions)

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
                field="prompt",
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
