"""Frames split into two messages: which ones are, and that they are joined again or are a ``BadFrame``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Step, Tensor
from cluster.core.limits import BULK_BYTES, MAX_FRAME_BYTES
from cluster.wire.frame_codec import decode, encode, with_body
from cluster.wire.message_split import FrameBody, FrameHead, pack, unpack


def frame(compute: Compute, nbytes: int) -> Frame:
    tensors = (
        Tensor("uint8", (nbytes // 2,), b"a" * (nbytes // 2)),
        Tensor("uint8", (nbytes // 2,), b"b" * (nbytes // 2)),
    )
    return Frame(7, 1, 3, (), Step(compute, (1,), ((5, 6),)), tensors)


def test_only_large_prefill_frames_are_cut() -> None:
    assert [p.bulk for p in pack(frame(Compute.PREFILL, BULK_BYTES))] == [False]
    assert [p.bulk for p in pack(frame(Compute.PREFILL, BULK_BYTES + 2))] == [False, True]
    assert [p.bulk for p in pack(frame(Compute.DECODE, 4 * BULK_BYTES))] == [False]


def test_a_cut_frame_comes_together_again() -> None:
    whole = frame(Compute.PREFILL, 2 * BULK_BYTES)
    first, second = pack(whole)
    head, body = unpack(first.message), unpack(second.message)
    assert isinstance(head, FrameHead)
    assert isinstance(body, FrameBody)
    assert not head.whole
    assert len(first.message) < 200
    assert (body.epoch, body.number) == (7, 3)
    assert encode(with_body(head.frame, body.data)) == encode(whole)
    with pytest.raises(BadFrame, match="in a separate message"):
        decode(first.message)
    with pytest.raises(BadFrame, match="tensors need"):
        with_body(head.frame, body.data[:-1])
    with pytest.raises(BadFrame, match="belong to no tensor"):
        with_body(head.frame, memoryview(bytes(body.data) + b"x"))
    with pytest.raises(BadFrame, match="damaged in transit"):
        unpack(first.message + b"x")


def test_a_damaged_body_is_refused() -> None:
    _, second = pack(frame(Compute.PREFILL, 2 * BULK_BYTES))
    for at in (5, 9, 20, len(second.message) - 1):
        damaged = bytearray(second.message)
        damaged[at] ^= 16
        with pytest.raises(BadFrame, match="damaged in transit"):
            unpack(bytes(damaged))


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(BadFrame, match="above the limit"):
        unpack(bytes(MAX_FRAME_BYTES + 1))


@given(st.binary(max_size=200))
def test_strangers_bytes_are_a_parcel_or_a_bad_frame(data: bytes) -> None:
    try:
        parcel = unpack(data)
    except BadFrame as e:
        assert e.sentence
    else:
        assert isinstance(parcel, FrameBody)
