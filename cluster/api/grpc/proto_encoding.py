"""Encodes the events of an answer as public protobuf messages."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

from cluster.codec.answer import FINISH_REASONS, encode_call, encode_figures, encode_token
from cluster.core.request import FinishEvent, PromptLogprobs, Request, TokenEvent
from cluster.model.tokenizer import Tokenizer
from cluster.v1 import inference_pb2 as pb


def prompt_info(request: Request, model: str, fallback: str = "") -> pb.PromptInfo:
    return pb.PromptInfo(
        request_id=request.id,
        model=model,
        prompt_tokens=len(request.prompt),
        seed=request.sampling.seed,
        max_tokens=request.max_tokens,
        samples=request.samples,
        fallback=fallback,
    )


def first_prompt_token(request: Request, tokenizer: Tokenizer) -> pb.PromptLogprobs:
    """Encode the first token of a prompt, which has no log-probability."""
    token = request.prompt[0]
    return pb.PromptLogprobs(start=0, tokens=[pb.PromptToken(token=token, text=tokenizer.token_text(token))])


def prompt_logprobs(piece: PromptLogprobs, request: Request, tokenizer: Tokenizer) -> pb.PromptLogprobs:
    """Encode a piece of the prompt, with the texts of its tokens and their alternatives."""
    own = request.prompt[piece.start : piece.start + len(piece.logprobs)]
    ids = {*own, *piece.top_tokens}
    texts = dict(zip(ids, tokenizer.token_texts(tuple(ids)), strict=True))
    tokens = (
        pb.PromptToken(
            token=token,
            text=texts[token],
            logprob=logprob,
            top=[pb.TopLogprob(token=t.token, text=texts[t.token], logprob=t.logprob) for t in piece.top(i)],
        )
        for i, (token, logprob) in enumerate(zip(own, piece.logprobs, strict=True))
    )
    return pb.PromptLogprobs(start=piece.start, tokens=tokens)


def token_event(event: TokenEvent, tokenizer: Tokenizer) -> pb.TokenEvent:
    """Encode one token of an answer, with the texts of its alternatives."""
    if event.top:
        event = replace(event, top=tuple(replace(t, text=tokenizer.token_text(t.token)) for t in event.top))
    return encode_token(event)


def finish_info(event: FinishEvent) -> pb.FinishInfo:
    usage = pb.Usage(
        prompt_tokens=event.usage.prompt_tokens,
        completion_tokens=event.usage.completion_tokens,
        cached_tokens=event.usage.cached_tokens,
        accepted_prediction_tokens=event.usage.accepted_prediction_tokens,
        rejected_prediction_tokens=event.usage.rejected_prediction_tokens,
    )
    rate = 1e3 / event.tpot_ms if event.tpot_ms else 0.0
    timings = pb.Timings(ttft_ms=event.ttft_ms, tpot_ms=event.tpot_ms, tokens_per_second=rate)
    return pb.FinishInfo(
        reason=FINISH_REASONS[event.reason],
        text=event.text,
        usage=usage,
        timings=timings,
        stages=map(encode_figures, event.stages),
        reasoning=event.reasoning,
        tool_calls=map(encode_call, event.calls),
        sample=event.sample,
    )


def embeddings(vectors: Sequence[Sequence[float]]) -> list[bytes]:
    """Return embeddings as little-endian float32."""
    return [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]
