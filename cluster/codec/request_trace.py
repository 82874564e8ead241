"""Encode and decode a request's trace."""

from __future__ import annotations

from cluster.codec.plan import decode_layers
from cluster.core.frames import StageTiming
from cluster.core.request_trace import RequestTrace, TracedEpoch, TracedFrame, TracedStage
from cluster.v1 import inference_pb2 as pb


def encode_trace(trace: RequestTrace) -> pb.TraceResponse:
    """Encode a trace."""
    return pb.TraceResponse(
        request_id=trace.request_id,
        prompt_tokens=trace.prompt_tokens,
        ended_seconds=trace.ended_seconds,
        complete=trace.complete,
        epochs=map(_encode_epoch, trace.epochs),
        frames=map(_encode_frame, trace.frames),
    )


def decode_trace(message: pb.TraceResponse) -> RequestTrace:
    """Decode a trace. Raise MacpipeError for invalid layers."""
    return RequestTrace(
        request_id=message.request_id,
        prompt_tokens=message.prompt_tokens,
        ended_seconds=message.ended_seconds if message.HasField("ended_seconds") else None,
        complete=message.complete,
        epochs=tuple(map(_decode_epoch, message.epochs)),
        frames=tuple(map(_decode_frame, message.frames)),
    )


def _encode_epoch(epoch: TracedEpoch) -> pb.TracedEpoch:
    stages = [pb.TracedStage(worker=s.worker, start_layer=s.layers.start, end_layer=s.layers.end) for s in epoch.stages]
    return pb.TracedEpoch(epoch=epoch.epoch, stages=stages)


def _decode_epoch(message: pb.TracedEpoch) -> TracedEpoch:
    stages = tuple(TracedStage(s.worker, decode_layers(s.start_layer, s.end_layer)) for s in message.stages)
    return TracedEpoch(message.epoch, stages)


def _encode_frame(frame: TracedFrame) -> pb.TracedFrame:
    return pb.TracedFrame(
        epoch=frame.epoch,
        lane=frame.lane,
        number=frame.number,
        sent_seconds=frame.sent_seconds,
        returned_seconds=frame.returned_seconds,
        own=frame.own,
        void=frame.void,
        prompt_tokens=frame.prompt_tokens,
        rows=frame.rows,
        timings=[
            pb.TracedTiming(stage=t.stage, wait_us=t.wait_us, compute_us=t.compute_us, pack_us=t.pack_us)
            for t in frame.timings
        ],
        tokens=frame.tokens,
    )


def _decode_frame(message: pb.TracedFrame) -> TracedFrame:
    return TracedFrame(
        epoch=message.epoch,
        lane=message.lane,
        number=message.number,
        sent_seconds=message.sent_seconds,
        returned_seconds=message.returned_seconds,
        own=message.own,
        void=message.void,
        prompt_tokens=message.prompt_tokens,
        rows=message.rows,
        timings=tuple(StageTiming(t.stage, t.wait_us, t.compute_us, t.pack_us) for t in message.timings),
        tokens=tuple(message.tokens),
    )
