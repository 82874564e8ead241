"""Encodes the commands and replies of training.

A message is ``u32 mark | u32 header length | u32 CRC-32 of the rest | msgpack header | tensors``, in little-endian
order. The mark is no possible beginning of a frame, so a data port tells both apart by their first bytes. Each field is
checked before anything is allocated from it. Every error is a ``BadFrame``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import isfinite, prod
from typing import Any, Final

import msgpack

from cluster.core.errors import BadFrame, Reason
from cluster.core.frames import Failure, Tensor
from cluster.core.limits import MAX_FRAME_BYTES, MAX_TENSOR_RANK
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply
from cluster.core.training_limits import MAX_STATE_TENSORS, MAX_TRAINING_HEADER_BYTES
from cluster.wire.frame_codec import ITEM_BYTES, checksum, require_checksum
from cluster.wire.header_elements import require_few_elements
from cluster.wire.header_fields import Fields

__all__ = ["decode_command", "decode_reply", "encode_command", "encode_reply", "is_training"]

VERSION: Final = 1
_MARK: Final = 0xFFFFFFFF
_PREFIX: Final = struct.Struct("<III")
_COMMAND_FIELDS: Final = 13
_REPLY_FIELDS: Final = 13


def is_training(message: bytes) -> bool:
    """Return whether a message of a data stream belongs to training."""
    return message[:4] == b"\xff\xff\xff\xff"


def encode_command(c: TrainingCommand) -> bytes:
    """Return the command as one message. Raises ``BadFrame`` if it would be longer than a frame may be."""
    flags = [c.train, c.gradient, c.update]
    head = (VERSION, c.epoch, c.number, int(c.task), c.batch, *flags, c.part, c.options, c.names)
    return _seal((*head, _describe(c.tensors), c.weight), c.tensors)


def encode_reply(r: TrainingReply) -> bytes:
    """Return the reply as one message. Raises ``BadFrame`` if it would be longer than a frame may be."""
    error = None if r.error is None else (r.error.stage, r.error.reason, r.error.sentence)
    figures = (r.parts, r.loss, r.counted, r.learning_rate, r.trained, r.peak_bytes, r.compute_us)
    return _seal((VERSION, r.epoch, r.number, *figures, error, r.names, _describe(r.tensors)), r.tensors)


def decode_command(message: bytes) -> TrainingCommand:
    """Return the command in a message; its tensors are views into it. Raises ``BadFrame``."""
    f, body = _open(message, "command", _COMMAND_FIELDS)
    try:
        task = Task(f.count(3))
    except ValueError as e:
        raise BadFrame(f"a training command of unknown kind {f.count(3)}") from e
    return TrainingCommand(
        epoch=f.count(1),
        number=f.count(2),
        task=task,
        batch=f.count(4),
        train=f.flag(5),
        gradient=f.flag(6),
        update=f.flag(7),
        part=f.count(8),
        options=f.text(9),
        names=_names(f, 10),
        tensors=_tensors(f.rows(11, MAX_STATE_TENSORS), body),
        weight=_finite(f, 12),
    )


def decode_reply(message: bytes) -> TrainingReply:
    """Return the reply in a message; its tensors are views into it. Raises ``BadFrame``."""
    f, body = _open(message, "reply", _REPLY_FIELDS)
    error = None
    if (value := f.optional_list(10)) is not None:
        e = Fields(value, "error", 3)
        error = Failure(e.count(0), Reason.parse(e.text(1)), e.text(2))
    return TrainingReply(
        epoch=f.count(1),
        number=f.count(2),
        parts=f.count(3),
        loss=f.number(4),
        counted=f.count(5),
        learning_rate=_finite(f, 6),
        trained=f.count(7),
        peak_bytes=f.count(8),
        compute_us=f.count(9),
        error=error,
        names=_names(f, 11),
        tensors=_tensors(f.rows(12, MAX_STATE_TENSORS), body),
    )


def _seal(fields: tuple[Any, ...], tensors: Iterable[Tensor]) -> bytes:
    header = msgpack.packb(fields)
    bodies = [memoryview(t.data).cast("B") for t in tensors]
    size = _PREFIX.size + len(header) + sum(body.nbytes for body in bodies)
    if size > MAX_FRAME_BYTES or len(header) > MAX_TRAINING_HEADER_BYTES:
        raise BadFrame(
            f"a training message would have {size} bytes; the limit is {MAX_FRAME_BYTES}; lower --batch-size or "
            "--max-seq-length"
        )
    return b"".join((_PREFIX.pack(_MARK, len(header), checksum(header, *bodies)), header, *bodies))


def _open(message: bytes, what: str, fields: int) -> tuple[Fields, memoryview]:
    view = memoryview(message)
    if not _PREFIX.size <= len(view) <= MAX_FRAME_BYTES:
        raise BadFrame(f"a training message of {len(view)} bytes is too short or too long")
    mark, length, stated = _PREFIX.unpack_from(view)
    end = _PREFIX.size + length
    if mark != _MARK or length > MAX_TRAINING_HEADER_BYTES or end > len(view):
        raise BadFrame(f"a training message of {len(view)} bytes claims a header of {length}")
    require_checksum(view, _PREFIX.size, stated)
    header = view[_PREFIX.size : end]
    require_few_elements(header)
    try:
        values = msgpack.unpackb(
            header, use_list=True, max_ext_len=0, max_map_len=0, max_array_len=MAX_STATE_TENSORS, max_bin_len=0
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as e:
        raise BadFrame(f"the header of a training message is not valid msgpack: {e}") from e
    opened = Fields(values, what, fields)
    if opened.count(0) != VERSION:
        raise BadFrame(f"a training message has layout version {opened.count(0)}; this program reads {VERSION}")
    return opened, view[end:]


def _describe(tensors: Iterable[Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(t.dtype, t.shape) for t in tensors]


def _names(f: Fields, i: int) -> tuple[str, ...]:
    names = f.rows(i, MAX_STATE_TENSORS)
    if not all(type(name) is str for name in names):
        raise BadFrame("a name in a training message is not text")
    return tuple(names)


def _finite(f: Fields, i: int) -> float:
    if not isfinite(value := f.number(i)):
        raise BadFrame("a figure in a training message is not a number")
    return value


def _tensors(rows: Iterable[Any], body: memoryview) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    start = 0
    for row in rows:
        f = Fields(row, "tensor", 2)
        dtype, shape = f.text(0), f.counts(1, MAX_TENSOR_RANK)
        if dtype not in ITEM_BYTES:
            raise BadFrame(f"a tensor of unknown type {dtype[:32]!r}")
        end = start + ITEM_BYTES[dtype] * prod(shape)
        if end > len(body):
            raise BadFrame(f"a training message's tensors need at least {end} bytes, but it has {len(body)}")
        tensors.append(Tensor(dtype, shape, body[start:end]))
        start = end
    if start != len(body):
        raise BadFrame(f"a training message carries {len(body) - start} bytes that belong to no tensor")
    return tuple(tensors)
