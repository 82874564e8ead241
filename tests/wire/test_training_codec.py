"""Commands and replies of training survive their messages; damaged and impossible ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Failure, Frame, Tensor
from cluster.core.limits import MAX_FRAME_BYTES
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply
from cluster.wire.frame_codec import encode
from cluster.wire.training_codec import decode_command, decode_reply, encode_command, encode_reply, is_training

TENSORS = (
    Tensor("float32", (1, 2), bytes(range(8))),
    Tensor("bfloat16", (2,), b"abcd"),
    Tensor("uint64", (), bytes(8)),
)
COMMAND = TrainingCommand(7, 2, Task.FORWARD, 3, True, True, True, 4, "{}", ("a", "b", "c"), TENSORS, 0.25)
REPLY = TrainingReply(7, 2, TENSORS, ("a", "b", "c"), 3, 2.5, 9, 1e-5, 64, 2**33, 12, Failure(1, "STAGE_FAILED", "no"))


def plain(message: Any) -> Any:
    return replace(message, tensors=tuple(replace(t, data=bytes(t.data)) for t in message.tensors))


def test_every_field_survives_its_message() -> None:
    assert plain(decode_command(encode_command(COMMAND))) == COMMAND
    assert plain(decode_reply(encode_reply(REPLY))) == REPLY


def test_a_frame_and_a_message_of_training_are_told_apart_by_their_first_bytes() -> None:
    assert is_training(encode_command(COMMAND))
    assert is_training(encode_reply(REPLY))
    assert not is_training(encode(Frame(7, 0, 1)))


@pytest.mark.parametrize("at", [4, 8, 20, -1])
def test_a_damaged_message_is_refused(at: int) -> None:
    message = bytearray(encode_command(COMMAND))
    message[at] ^= 1
    with pytest.raises(BadFrame):
        decode_command(bytes(message))


def test_what_is_cut_off_or_too_long_is_refused() -> None:
    with pytest.raises(BadFrame):
        decode_reply(encode_reply(REPLY)[:-1])
    with pytest.raises(BadFrame, match="lower --batch-size"):
        encode_command(replace(COMMAND, tensors=(Tensor("uint8", (MAX_FRAME_BYTES,), bytes(MAX_FRAME_BYTES)),)))


def test_a_figure_that_is_no_number_is_refused_but_a_loss_may_be_none() -> None:
    assert decode_reply(encode_reply(replace(REPLY, loss=float("inf")))).loss == float("inf")
    with pytest.raises(BadFrame, match="not a number"):
        decode_reply(encode_reply(replace(REPLY, learning_rate=float("nan"))))
    with pytest.raises(BadFrame, match="not a number"):
        decode_command(encode_command(replace(COMMAND, weight=float("nan"))))
