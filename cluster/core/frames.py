"""Frames: a frame is one step of one lane, an entry of the log that every stage applies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cluster.core.errors import Reason
from cluster.core.request import PromptLogprobs, SamplingParams, TopLogprob


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's microseconds for a frame: queued and computed; ``pack_us`` is for sending the previous frame."""

    stage: int
    wait_us: int
    compute_us: int
    pack_us: int


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence starts with empty caches. Tokens from ``prompt_length`` on count as its answer.

    With ``look_ahead``, its samples report the tokens that its grammar forces after them. ``noise`` is the vocabulary
    for which tokens are drawn, if that is another than this model's: the target's, whose tokens a draft guesses.
    ``adapter`` is the key of the adapter that computes it, "" for none. ``embeds``: each of its samples comes with the
    hidden state that it was sampled from.
    """

    sequence: int
    prompt_length: int
    sampling: SamplingParams
    look_ahead: bool = False
    noise: int = 0
    adapter: str = ""
    embeds: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """A sequence ends: every stage frees its caches."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Trim:
    """A sequence keeps at most its first ``length`` tokens. Caches that cannot be trimmed need a mark there.

    A shorter sequence stays as it is: a stage that did not compute a guess has nothing to drop.
    """

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Keep the state of a sequence's caches that cannot be trimmed. ``length`` is how many tokens it has now."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Unmark:
    """A sequence drops its mark at ``length``. Prefixes that have it keep it."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Save:
    """Keep a copy of a sequence's caches, and its marks, as prefix ``prefix``."""

    sequence: int
    prefix: int


@dataclass(frozen=True, slots=True)
class Restore:
    """A sequence that has just joined starts from the first ``length`` tokens of a kept prefix.

    It also gets the prefix's marks up to there. Caches that cannot be trimmed need a mark at ``length``, unless that is
    the whole prefix.
    """

    sequence: int
    prefix: int
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop a kept prefix and its marks."""

    prefix: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Write a kept prefix to each stage's disk, as far as there is time and room before it is dropped.

    ``owner`` is the name of the owner whose requests alone may start from it, ``adapter`` that of the adapter.
    """

    prefix: int
    owner: str
    adapter: str = ""


Edit = Join | Leave | Trim | Mark | Unmark | Save | Restore | Drop | Persist


class Compute(IntEnum):
    """The purpose of a step: which of its positions the last stage samples."""

    PREFILL = 0
    """No position: the step only fills the caches."""
    DECODE = 1
    """The last position, and each one before a guess."""


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Tells the last stage to report log-probabilities of prompt tokens with a prefill step of one sequence.

    ``targets`` are the tokens that follow consecutive positions of the step, after its first ``skip`` positions. The
    last target may be the first token of the next chunk. ``top`` is the number of alternatives at each position.
    """

    skip: int
    targets: tuple[int, ...]
    top: int


@dataclass(frozen=True, slots=True)
class Step:
    """A computation. ``tokens`` has one row of token ids per sequence of ``sequences``; all rows have one length.

    A step of several sequences sets its lane's batch to exactly these, in this order, on every stage. A new sequence
    joins the batch; one that is left out leaves it, but need not end. Keep the order from frame to frame and append new
    sequences: any other order costs a copy of the batch. A step of one sequence does not change the lane's batch, so a
    prompt can be prefilled in between.

    All sequences of a step have the same adapter.

    A step of one sequence may feed guesses of its next tokens: ``guesses`` of the sequence's last tokens, up to the end
    of this row, were guessed when the step was written. ``start`` is the position of the row's first token. It is None
    for a step of several sequences. The row may hold one certain token with guesses behind it, or several guesses. Then
    its positions are sampled in order, up to the first sample that is not the token that the row feeds next.

    ``drafts`` above 1 makes a stage that holds the whole model feed each sample back, until it has that many samples.
    """

    compute: Compute
    sequences: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    scoring: PromptScoring | None = None
    guesses: int = 0
    start: int | None = None
    drafts: int = 1

    @property
    def guessed(self) -> bool:
        """Whether every token of the row is a guess. Only such a step can become void."""
        return self.guesses > 0 and self.guesses >= len(self.tokens[0])

    @property
    def sampled(self) -> int:
        """The most positions of a row that the last stage samples; they are the row's last ones."""
        return 0 if self.compute is Compute.PREFILL else min(len(self.tokens[0]), self.guesses + 1)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A raw tensor: ``dtype`` by MLX's name (``bfloat16``), row-major little-endian ``data``."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Sample:
    """A token that the last stage sampled; ``position`` is its index in the sequence, prompt included.

    ``final``: the sequence's grammar is complete with it, and only an end could follow. ``forced`` are the next tokens,
    if the grammar allows no others; at most ``MAX_FORCED_TOKENS``. ``state`` is the hidden state behind it as
    little-endian float32, if the sequence embeds. A reply has the states in its tensors (``hidden_states``).
    """

    sequence: int
    position: int
    token: int
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    final: bool = False
    forced: tuple[int, ...] = ()
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """An error's reason and sentence for one sequence of a step, whose other sequences have samples."""

    sequence: int
    reason: Reason
    sentence: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a stage: its ``reason`` and sentence, and the stage's index."""

    stage: int
    reason: Reason
    sentence: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One entry of a lane's log.

    ``number`` counts the frames of an epoch in the order in which the coordinator wrote them. A frame without a step
    has only edits. ``tensors`` is the boundary value that leaves a stage (none towards stage 0). The last stage returns
    only ``samples``, ``failures``, ``prompt_logprobs`` and, as ``tensors``, hidden states that sequences asked for. A
    failed sequence can only leave. Of a row of guesses, a sequence has a sample for each position that follows right
    ones; then one may fail. A row whose grammar is still being compiled has neither sample nor failure yet; it comes
    with a later frame. A frame with an ``error`` continues to the end of the ring, so that every stage applies its
    edits, but no stage computes it any further. The same is true of a ``void`` frame: a guess that a stage found to be
    wrong, or of no use any more. It breaks nothing.
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
    prompt_logprobs: PromptLogprobs | None = None
    void: bool = False
