"""Reads the hidden states in a reply: a tensor of sequence ids, and one with a row of float32 for each of them."""

from __future__ import annotations

import struct
from dataclasses import replace

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame, Sample

__all__ = ["attach_states"]

ITEM_BYTES = 4


def attach_states(frame: Frame) -> tuple[Sample, ...]:
    """Return the samples of a reply with their states. Raise ``BadFrame`` if its tensors are not ids and states."""
    if not frame.tensors:
        return frame.samples
    try:
        ids, states = frame.tensors
        (count,), (rows, width) = ids.shape, states.shape
        known = struct.unpack(f"<{count}q", ids.data)
    except (ValueError, TypeError, OverflowError, struct.error) as e:
        raise BadFrame(f"invalid frame {frame.number} of epoch {frame.epoch}: its tensors are no hidden states") from e
    if (ids.dtype, states.dtype) != ("int64", "float32") or rows != count:
        raise BadFrame(f"invalid frame {frame.number} of epoch {frame.epoch}: its tensors are no hidden states")
    size, data = width * ITEM_BYTES, memoryview(states.data).cast("B")
    by_id = {sequence: bytes(data[i * size : (i + 1) * size]) for i, sequence in enumerate(known)}
    return tuple(replace(s, state=by_id.get(s.sequence, b"")) for s in frame.samples)
