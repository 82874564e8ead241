"""What coordinator and stages say to each other in training: commands to one stage, each with one reply.

A stage runs its commands in the order of their arrival. The coordinator alone decides that order, since every value
that crosses a cut passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

from cluster.core.frames import Failure, Tensor
from cluster.core.training_limits import STATE_PART_BYTES, STATE_PART_TENSORS

Value = TypeVar("Value")
ADAPTER: Final = "adapter/"
"""How the names of adapters begin in a training state."""


class Purpose(IntEnum):
    """What a batch is for."""

    TRAIN = 0
    VALIDATE = 1
    TEST = 2


@dataclass(frozen=True, slots=True)
class DataBatch:
    """A batch, or a micro-batch: some rows of one. Token ids, int32 [rows, length], padded with zeros.

    ``number`` counts them in a run from 1. ``iteration`` is the training step that it belongs to. ``last``: no other
    batch of the same evaluation follows. ``lengths``, int32 [rows, 2], are the first and the last position of each row
    that count in the loss. ``weight`` is the share of the batch's counted tokens that these rows have. ``ends_batch``:
    no other micro-batch of the same batch follows.
    """

    number: int
    purpose: Purpose
    iteration: int
    last: bool
    shape: tuple[int, int]
    tokens: bytes
    lengths: bytes
    weight: float = 1.0
    ends_batch: bool = True


class Task(IntEnum):
    """What a stage is to do."""

    PREPARE = 0
    """Become a stage that trains, by ``options``. The reply has the names of what it trains."""
    FORWARD = 1
    """Run a batch forward. On the last stage, also compute the loss and, in training, go back."""
    BACKWARD = 2
    """Take a batch's gradients back."""
    READ_STATE = 3
    """Return a part of the training state."""
    WRITE_STATE = 4
    """Take a part of a training state; with ``update``, it is the last part, and the stage continues from it."""


@dataclass(frozen=True, slots=True)
class TrainingCommand:
    """One command. ``number`` counts the commands to one stage in an epoch.

    ``batch`` is the number of a batch; ``tensors`` are its tokens, its lengths, then what the stage before passed on,
    or the gradients of what this stage passed on. ``train``: the batch comes back. ``gradient``: return gradients of
    what came in. ``update``: update the adapters after this batch. ``weight`` scales the gradients of its mean loss.
    ``part`` counts the parts of a state from 0, whose tensors have ``names``.
    """

    epoch: int
    number: int
    task: Task
    batch: int = 0
    train: bool = False
    gradient: bool = False
    update: bool = False
    part: int = 0
    options: str = ""
    names: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TrainingReply:
    """The reply to the command with the same ``number``.

    ``loss`` is the mean over the ``counted`` tokens of a batch, on the last stage. ``parts`` is the number of parts of
    a state. ``trained`` are the numbers that the stage trains. ``peak_bytes`` is the peak of its memory since
    ``PREPARE``.
    """

    epoch: int
    number: int
    tensors: tuple[Tensor, ...] = ()
    names: tuple[str, ...] = ()
    parts: int = 0
    loss: float = 0.0
    counted: int = 0
    learning_rate: float = 0.0
    trained: int = 0
    peak_bytes: int = 0
    compute_us: int = 0
    error: Failure | None = None


def split_state(state: Mapping[str, Value], nbytes: Callable[[Value], int]) -> list[dict[str, Value]]:
    """Split a training state into parts of bounded size; a large tensor is a part of its own.

    ``nbytes`` returns the bytes of a tensor.
    """
    parts: list[dict[str, Value]] = []
    size = 0
    for name, tensor in state.items():
        own = nbytes(tensor)
        if not parts or size + own > STATE_PART_BYTES or len(parts[-1]) >= STATE_PART_TENSORS:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += own
    return parts
