"""The messages between the coordinator and the process that makes batches: msgpack after a length of four bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import astuple, dataclass
from typing import Any, Final

import msgpack

from cluster.core.errors import BadFrame, Reason
from cluster.core.training_frames import DataBatch, Purpose
from cluster.core.training_limits import MAX_BATCH_BYTES

__all__ = [
    "HEADER",
    "DataFailed",
    "DataReady",
    "Made",
    "pack",
    "pack_request",
    "payload_size",
    "unpack",
    "unpack_request",
]

HEADER: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class DataReady:
    """The data is tokenized. ``cut`` sequences are too long, and are cut; the longest has ``longest`` tokens."""

    cut: int
    longest: int


@dataclass(frozen=True, slots=True)
class DataFailed:
    """The data cannot be used: an error's reason and sentence."""

    reason: Reason
    sentence: str


Made = DataReady | DataFailed | DataBatch
_KINDS: Final = {kind.__name__: kind for kind in (DataReady, DataFailed, DataBatch)}


def pack_request(folder: str, tokenizer_folder: str, options: str) -> bytes:
    """Return the one message to the process: a line of JSON."""
    return json.dumps([folder, tokenizer_folder, options]).encode() + b"\n"


def unpack_request(line: bytes) -> tuple[str, str, str]:
    """Return the folders of data and tokenizer, and the options."""
    folder, tokenizer_folder, options = json.loads(line)
    return folder, tokenizer_folder, options


def pack(message: Made) -> bytes:
    """Return a message with its length."""
    payload: bytes = msgpack.packb((type(message).__name__, *astuple(message)))
    return HEADER.pack(len(payload)) + payload


def payload_size(header: bytes) -> int:
    """Return the size of the message after ``header``. Raises BadFrame if it is too long."""
    (size,) = HEADER.unpack(header)
    if size > MAX_BATCH_BYTES:
        raise BadFrame(f"a batch of {size} bytes is above the limit of {MAX_BATCH_BYTES}")
    return int(size)


def unpack(payload: bytes) -> Made:
    """Return the message in a payload. Raises BadFrame if it is invalid."""
    try:
        name, *values = msgpack.unpackb(payload)
        made: Any = _KINDS[name]
        if made is DataBatch:
            number, purpose, iteration, last, shape, *rest = values
            return DataBatch(number, Purpose(purpose), iteration, last, tuple(shape), *rest)
        if made is DataFailed:
            reason, sentence = values
            return DataFailed(Reason(reason), sentence)
        message: Made = made(*values)
        return message
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise BadFrame(f"the process that makes batches sent an invalid message: {type(error).__name__}") from error
