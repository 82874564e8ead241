"""The frame: one step of one lane, an entry of the log that every stage applies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cluster.core.request import SamplingParams, TopLogprob


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's microseconds with one frame: queued, computed; ``pack_us``: pack and hand over the one before it."""

    stage: int
    wait_us: int
    compute_us: int
    pack_us: int


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence enters with empty caches. Tokens from ``prompt_length`` on count as its answer."""

    sequence: int
    prompt_length: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Leave:
    """A sequence ends: every stage frees its caches."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Trim:
    """A sequence forgets all but its first ``length`` tokens."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Save:
    """Keep a copy of a sequence's caches as prefix ``prefix``."""

    sequence: int
    prefix: int


@dataclass(frozen=True, slots=True)
class Restore:
    """A sequence that has just joined starts from a kept prefix."""

    sequence: int
    prefix: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a kept prefix."""

    prefix: int


Edit = Join | Leave | Trim | Save | Restore | Drop


class Compute(IntEnum):
    """What a step is for: which of its positions the last stage samples."""

    PREFILL = 0
    """None: the caches are filled, nothing else."""
    DECODE = 1
    """The last one."""
    VERIFY = 2
    """Every one, for speculative decoding."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute: ``tokens`` has one row of token ids, all of one length, for each of ``sequences``.

    A step of several sequences makes its lane's batch hold just these, in this order, on every stage: naming a new one
    is joining the batch, and leaving one out (which need not end it) is leaving. Keep the order from frame to frame and
    put new ones last: any other order costs a copy of the batch. A step of one leaves the lane's batch as it is, so a
    prompt can be filled in between.
    """

    compute: Compute
    sequences: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A raw tensor: ``dtype`` by MLX's name (``bfloat16``), row-major little-endian ``data``."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Sample:
    """A token the last stage picked; ``position`` is its index in the sequence, prompt included.

    ``final``: with it the sequence's grammar is complete, and only an end could follow.
    """

    sequence: int
    position: int
    token: int
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    final: bool = False


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """One sequence of a step that has no sample, while the others of the step do: an error's reason and sentence."""

    sequence: int
    reason: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What a stage could not do: an error's ``reason`` and sentence, and which stage says so."""

    stage: int
    reason: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One entry of a lane's log.

    ``number`` counts the frames of an epoch in the order in which the coordinator wrote them. A frame without a step
    carries edits alone. ``tensors`` is the boundary value that leaves a stage (none towards stage 0); ``samples`` and
    ``failures``, and nothing else, come back from the last stage: a sequence that failed can only leave. A frame with
    an ``error`` goes on to the end of the ring, so that every stage applies its edits, but is computed no further.
    """

    epoch: int
    lane: int
    number: int
    edits: tuple[Edit, ...] = ()
    step: Step | None = None
    tensors: tuple[Tensor, ...] = ()
    samples: tuple[Sample, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()
    timings: tuple[StageTiming, ...] = ()
    error: Failure | None = None
