"""Encode and decode the parts of an answer that coordinator and client share."""

from __future__ import annotations

from typing import Final

from cluster.codec.plan import decode_layers
from cluster.core.request import FinishReason, StageFigures, TokenEvent, ToolCallDelta, TopLogprob
from cluster.v1 import inference_pb2 as pb

FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
FINISH_REASON_OF: Final = {number: reason for reason, number in FINISH_REASONS.items()}


def encode_token(event: TokenEvent) -> pb.TokenEvent:
    """Encode one token of an answer. Its alternatives must have their texts."""
    return pb.TokenEvent(
        index=event.index,
        token=event.token,
        text=event.text,
        logprob=event.logprob,
        top=[pb.TopLogprob(token=one.token, text=one.text, logprob=one.logprob) for one in event.top],
        reasoning=event.reasoning,
        tool_calls=map(encode_call, event.calls),
        sample=event.sample,
        stages=map(encode_figures, event.stages),
        cached_tokens=event.cached_tokens,
        guess=event.guess,
    )


def decode_token(message: pb.TokenEvent) -> TokenEvent:
    """Decode one token of an answer. Raise MacpipeError for invalid layers."""
    return TokenEvent(
        index=message.index,
        token=message.token,
        text=message.text,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple(TopLogprob(one.token, one.logprob, one.text) for one in message.top),
        reasoning=message.reasoning,
        calls=tuple(map(decode_call, message.tool_calls)),
        sample=message.sample,
        stages=tuple(map(decode_figures, message.stages)),
        cached_tokens=message.cached_tokens,
        guess=message.guess,
    )


def encode_figures(figures: StageFigures) -> pb.StageFigures:
    """Encode a stage's times."""
    return pb.StageFigures(
        worker=figures.worker,
        start_layer=figures.layers.start,
        end_layer=figures.layers.end,
        compute_ms=figures.compute_ms,
        wire_ms=figures.wire_ms,
        wait_ms=figures.wait_ms,
    )


def decode_figures(message: pb.StageFigures) -> StageFigures:
    """Decode a stage's times. Raise MacpipeError for invalid layers."""
    layers = decode_layers(message.start_layer, message.end_layer)
    return StageFigures(message.worker, layers, message.compute_ms, message.wire_ms, message.wait_ms)


def encode_call(delta: ToolCallDelta) -> pb.ToolCallDelta:
    """Encode a piece of a tool call."""
    return pb.ToolCallDelta(index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments)


def decode_call(message: pb.ToolCallDelta) -> ToolCallDelta:
    """Decode a piece of a tool call."""
    return ToolCallDelta(message.index, message.id, message.name, message.arguments)
