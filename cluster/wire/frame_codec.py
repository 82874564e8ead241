"""Encodes frames as bytes: ``u32 header length | u32 CRC-32 of all that follows | msgpack header | tensors``.

Numbers are little-endian; tensors are raw bytes. TCP's checksum misses some damage, and a flipped bit in an activation
would silently give a wrong token, so a damaged frame is rejected.

The bytes of large tensors may travel in a separate message (``message_split``); a flag in the header says so. It knows
the layout and every bound, nothing of what a frame means. Each field is checked before anything is allocated from it.
Every error is a ``BadFrame``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from math import prod
from typing import Any

import msgpack

from cluster.core.errors import BadFrame, Reason
from cluster.core.frames import (
    Compute,
    Failure,
    Frame,
    PromptScoring,
    Sample,
    SequenceFailure,
    StageTiming,
    Step,
    Tensor,
)
from cluster.core.limits import (
    MAX_DRAFTS,
    MAX_EDITS,
    MAX_FORCED_TOKENS,
    MAX_FRAME_BYTES,
    MAX_FRAME_HEADER_BYTES,
    MAX_ROWS,
    MAX_STAGES,
    MAX_TENSOR_RANK,
    MAX_TENSORS,
    MAX_TOP_LOGPROBS,
    MAX_VERIFIED,
)
from cluster.core.request import PromptLogprobs, TopLogprob
from cluster.wire.edit_codec import pack_edit, unpack_edit
from cluster.wire.header_elements import require_few_elements
from cluster.wire.header_fields import Fields, pack_ids, pack_numbers, unpack_ids, unpack_numbers

VERSION = 11
_PREFIX = struct.Struct("<II")
_FIELDS = 14

ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "complex64": 8,
}  # fmt: skip
"""Bytes of one element, by MLX's name of the type."""


def encode(frame: Frame) -> bytes:
    """Return the frame as one message. The tensors' bytes are copied once."""
    header = pack_header(frame, apart=False)
    return b"".join((header, *_bodies(frame)))


def pack_header(frame: Frame, *, apart: bool) -> bytes:
    """Return the frame's length prefix and header. ``apart``: the tensors' bytes are sent in a separate message."""
    header = msgpack.packb(
        (
            VERSION,
            frame.epoch,
            frame.lane,
            frame.number,
            [pack_edit(e) for e in frame.edits],
            _pack_step(frame.step),
            [(t.dtype, t.shape) for t in frame.tensors],
            [_pack_sample(s) for s in frame.samples],
            list(chain.from_iterable((t.stage, t.wait_us, t.compute_us, t.pack_us) for t in frame.timings)),
            None if (e := frame.error) is None else (e.stage, e.reason, e.sentence),
            [(f.sequence, f.reason, f.sentence) for f in frame.failures],
            apart,
            _pack_prompt_logprobs(frame.prompt_logprobs),
            frame.void,
        )
    )
    body = [] if apart else _bodies(frame)
    return bytes(_PREFIX.pack(len(header), checksum(header, *body)) + header)


def _bodies(frame: Frame) -> list[memoryview]:
    return [memoryview(t.data).cast("B") for t in frame.tensors]


def checksum(*parts: bytes | memoryview) -> int:
    """Return the CRC-32 of the concatenated parts: 7 us for 16 KiB, 4 ms for 8 MiB."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def require_checksum(message: memoryview, start: int, stated: int) -> None:
    """Raise ``BadFrame`` unless the message's bytes from ``start`` on have the checksum ``stated``."""
    if checksum(message[start:]) != stated:
        raise BadFrame(f"a frame of {len(message)} bytes was damaged in transit: its checksum does not match")


def decode(message: bytes) -> Frame:
    """Return the frame in a message; its tensors are views into it. Raises ``BadFrame``."""
    frame, apart = decode_head(message)
    if apart:
        raise BadFrame(f"the tensors of frame {frame.number} are in a separate message; a whole frame was expected")
    return frame


def decode_head(message: bytes) -> tuple[Frame, bool]:
    """Return the frame in a message, and whether its tensors' bytes are in a separate message (here they are empty).

    Raises ``BadFrame``.
    """
    view = memoryview(message)
    end = _header_end(view)
    f = Fields(_unpack(view[_PREFIX.size : end]), "header", _FIELDS)
    if f.count(0) != VERSION:
        raise BadFrame(f"the frame has layout version {f.count(0)}; this program reads version {VERSION}")
    apart = f.flag(11)
    frame = Frame(
        epoch=f.count(1),
        lane=f.count(2),
        number=f.count(3),
        edits=tuple(unpack_edit(e) for e in f.rows(4, MAX_EDITS)),
        step=_unpack_step(f.optional_list(5)),
        tensors=_apart(f.rows(6, MAX_TENSORS)) if apart else _tensors(f.rows(6, MAX_TENSORS), view[end:]),
        samples=tuple(_unpack_sample(s) for s in f.rows(7, MAX_EDITS)),
        timings=_timings(f.counts(8, 4 * MAX_STAGES)),
        error=_unpack_failure(f.optional_list(9)),
        failures=tuple(_unpack_sequence_failure(row) for row in f.rows(10, MAX_ROWS)),
        prompt_logprobs=_unpack_prompt_logprobs(f.optional_list(12)),
        void=f.flag(13),
    )
    if apart and len(view) > end:
        raise BadFrame(f"a frame with a separate body has {len(view) - end} bytes after its header")
    return frame, apart


def with_body(frame: Frame, body: memoryview) -> Frame:
    """Return the frame with its tensors' bytes from a separate message. Raises ``BadFrame`` if they do not fit."""
    return replace(frame, tensors=_tensors([[t.dtype, list(t.shape)] for t in frame.tensors], body))


def _header_end(view: memoryview) -> int:
    if len(view) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(view)} bytes is above the limit of {MAX_FRAME_BYTES}")
    if len(view) < _PREFIX.size:
        raise BadFrame(f"a frame of {len(view)} bytes has no header")
    length, stated = _PREFIX.unpack_from(view)
    if length > MAX_FRAME_HEADER_BYTES or _PREFIX.size + length > len(view):
        raise BadFrame(f"a frame of {len(view)} bytes claims a header of {length}")
    require_checksum(view, _PREFIX.size, stated)
    return int(_PREFIX.size + length)


def _unpack(header: memoryview) -> Any:
    require_few_elements(header)
    try:
        return msgpack.unpackb(
            header,
            use_list=True,
            max_ext_len=0,
            max_map_len=0,
            max_array_len=MAX_EDITS,
            max_bin_len=MAX_FRAME_HEADER_BYTES,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as e:
        raise BadFrame(f"the frame's header is not valid msgpack: {e}") from e


def _pack_step(step: Step | None) -> tuple[Any, ...] | None:
    if step is None:
        return None
    width = len(step.tokens[0])
    scoring = None if (s := step.scoring) is None else (s.skip, pack_ids(s.targets), s.top)
    ids = pack_ids(chain.from_iterable(step.tokens))
    return int(step.compute), step.sequences, width, ids, scoring, step.guesses, step.start, step.drafts


def _unpack_step(value: list[Any] | None) -> Step | None:
    if value is None:
        return None
    f = Fields(value, "step", 8)
    sequences = f.counts(1, MAX_ROWS)
    width = f.count(2)
    ids = unpack_ids(f.blob(3))
    if not sequences or not width or len(sequences) * width != len(ids):
        raise BadFrame(f"a step of {len(sequences)} rows of {width} tokens carries {len(ids)} token ids")
    rows = tuple(ids[a:b] for a, b in pairwise(range(0, len(ids) + 1, width)))
    start = None if value[6] is None else f.count(6)
    scoring, drafts = _unpack_scoring(f.optional_list(4)), f.count(7)
    if not 1 <= drafts <= MAX_DRAFTS:
        raise BadFrame(f"a step drafts {drafts} tokens; it may draft 1 to {MAX_DRAFTS}")
    step = Step(_compute(f.count(0)), sequences, rows, scoring, f.count(5), start, drafts)
    if step.sampled > MAX_VERIFIED:
        raise BadFrame(f"a step samples {step.sampled} tokens of a sequence; it may sample {MAX_VERIFIED}")
    return step


def _unpack_scoring(value: list[Any] | None) -> PromptScoring | None:
    if value is None:
        return None
    f = Fields(value, "scoring", 3)
    return PromptScoring(f.count(0), unpack_ids(f.blob(1)), _top_count(f.count(2)))


def _top_count(count: int) -> int:
    if count > MAX_TOP_LOGPROBS:
        raise BadFrame(f"a frame has {count} alternatives per token; the limit is {MAX_TOP_LOGPROBS}")
    return count


def _compute(code: int) -> Compute:
    try:
        return Compute(code)
    except ValueError as e:
        raise BadFrame(f"a step of unknown kind {code}") from e


def _apart(rows: Iterable[Any]) -> tuple[Tensor, ...]:
    return tuple(Tensor(dtype, shape, b"") for dtype, shape in map(_read_description, rows))


def _read_description(row: Any) -> tuple[str, tuple[int, ...]]:
    f = Fields(row, "tensor", 2)
    dtype, shape = f.text(0), f.counts(1, MAX_TENSOR_RANK)
    if dtype not in ITEM_BYTES:
        raise BadFrame(f"a tensor of unknown type {dtype[:32]!r}")
    return dtype, shape


def _tensors(rows: Iterable[Any], body: memoryview) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    start = 0
    for dtype, shape in map(_read_description, rows):
        end = start + ITEM_BYTES[dtype] * prod(shape)
        if end > len(body):
            raise BadFrame(f"a frame's tensors need at least {end} bytes, but it has {len(body)}")
        tensors.append(Tensor(dtype, shape, body[start:end]))
        start = end
    if start != len(body):
        raise BadFrame(f"a frame carries {len(body) - start} bytes that belong to no tensor")
    return tuple(tensors)


def _pack_sample(s: Sample) -> tuple[Any, ...]:
    top = [(t.token, t.logprob) for t in s.top]
    return s.sequence, s.position, s.token, s.logprob, top, s.final, pack_ids(s.forced)


def _unpack_sample(value: Any) -> Sample:
    f = Fields(value, "sample", 7)
    logprob = None if value[3] is None else f.number(3)
    top = [Fields(row, "alternative", 2) for row in f.rows(4, MAX_TOP_LOGPROBS)]
    alternatives = tuple(TopLogprob(row.count(0), row.number(1)) for row in top)
    forced = unpack_ids(f.blob(6))
    if len(forced) > MAX_FORCED_TOKENS:
        raise BadFrame(f"a sample has {len(forced)} forced tokens; the limit is {MAX_FORCED_TOKENS}")
    return Sample(f.count(0), f.count(1), f.count(2), logprob, alternatives, f.flag(5), forced)


def _pack_prompt_logprobs(p: PromptLogprobs | None) -> tuple[Any, ...] | None:
    """Return the values as float32, which holds every type of logits exactly."""
    if p is None:
        return None
    return p.start, pack_numbers(p.logprobs), pack_ids(p.top_tokens), pack_numbers(p.top_logprobs)


def _unpack_prompt_logprobs(value: list[Any] | None) -> PromptLogprobs | None:
    if value is None:
        return None
    f = Fields(value, "prompt log-probabilities", 4)
    start, own = f.count(0), unpack_numbers(f.blob(1))
    tokens, logprobs = unpack_ids(f.blob(2)), unpack_numbers(f.blob(3))
    if not own or len(tokens) != len(logprobs) or len(tokens) % len(own):
        raise BadFrame(f"{len(own)} prompt tokens have {len(tokens)} alternatives with {len(logprobs)} values")
    _top_count(len(tokens) // len(own))
    return PromptLogprobs(start, own, tokens, logprobs)


def _unpack_failure(value: list[Any] | None) -> Failure | None:
    if value is None:
        return None
    f = Fields(value, "error", 3)
    return Failure(f.count(0), Reason.parse(f.text(1)), f.text(2))


def _unpack_sequence_failure(value: Any) -> SequenceFailure:
    f = Fields(value, "failure", 3)
    return SequenceFailure(f.count(0), Reason.parse(f.text(1)), f.text(2))


def _timings(flat: tuple[int, ...]) -> tuple[StageTiming, ...]:
    if len(flat) % 4:
        raise BadFrame("a frame's timings are not four numbers per stage")
    return tuple(StageTiming(*flat[i : i + 4]) for i in range(0, len(flat), 4))
