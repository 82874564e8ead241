"""One stage: frames in, frames out. It holds a slice of the model and the caches of every live sequence.

It knows the frame and the slice. It refuses to know where frames come from, when, or who waits for them: no network,
no clock, no thread. One thread per process loads it and steps it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import mlx.core as mx

from cluster.errors import BadFrame, MacpipeError, StageFailed, StaleEpoch
from cluster.frames import Compute, Frame, Sample, Step, Tensor
from cluster.model.loading import load_slice
from cluster.model.sampling import Picked
from cluster.model.sequences import LiveSequence, SequenceTable
from cluster.model.slice import ModelSlice
from cluster.model.tensors import pack, unpack
from cluster.types import StageSpec

__all__ = ["Stage", "load_stage"]

STEPS_BETWEEN_CLEARS: Final = 256
"""Decode steps after which MLX's buffer cache is emptied, as mlx-lm does."""


def load_stage(spec: StageSpec, path: Path, progress: Callable[[int, int], None]) -> Stage:
    """Build the stage that ``spec`` describes from the checkpoint in ``path``, reading its own tensors only.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each layer. Raises ModelDiffers,
    NoPlan (a cut that is not clean), ModelNotFound, BadCheckpoint or ModelUnsupported.
    """
    return Stage(spec, *load_slice(spec, path, progress))


class Stage:
    """A loaded stage. Not thread-safe: only the thread that loaded it may use it.

    ``weight_bytes`` is what its weights take.
    """

    def __init__(self, spec: StageSpec, part: ModelSlice, vocabulary: int, weight_bytes: int) -> None:
        self.spec = spec
        self.weight_bytes = weight_bytes
        self._slice: ModelSlice | None = part
        self._vocabulary = vocabulary
        self._table = SequenceTable(part.new_caches, vocabulary)
        self._steps = 0

    @property
    def sequences(self) -> int:
        """Live sequences."""
        return self._table.sequences

    @property
    def prefixes(self) -> int:
        """Kept prefixes."""
        return self._table.prefixes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of sequences and prefixes."""
        return self._table.cache_bytes

    def close(self) -> None:
        """Free weights and caches. Every later step raises StageFailed."""
        self._slice = None
        self._table = SequenceTable(_no_caches, self._vocabulary)
        gc.collect()  # a slice's replaced calls refer back to it: only the collector frees such a ring
        mx.clear_cache()

    def begin_epoch(self, spec: StageSpec) -> None:
        """Serve the same layers under a new plan's epoch: weights stay, sequences and prefixes go.

        Raises StaleEpoch when ``spec`` wants another model or other layers: that is a load.
        """
        if (spec.model.fingerprint, spec.layers) != (self.spec.model.fingerprint, self.spec.layers):
            raise StaleEpoch(f"This stage holds layers {self.spec.layers} of {self.spec.model.name}; load it anew.")
        self.spec = spec
        self._table = SequenceTable(self._loaded().new_caches, self._vocabulary)
        mx.clear_cache()

    def step(self, frame: Frame) -> Frame:
        """Apply the frame's edits in order, compute its step, and return the frame for the next stage; the last stage
        returns the reply (samples, no edits, no step).

        Raises StaleEpoch before anything is applied; BadFrame for a frame that asks the impossible; StageFailed when
        the model's forward fails. Edits have been applied then. A frame that carries an error is passed on with its
        edits applied. Either way the sequences of its step are refused until they leave: some stages have computed
        it and some have not, and going on would give wrong tokens.
        """
        if frame.epoch != self.spec.epoch:
            raise StaleEpoch(f"A frame of epoch {frame.epoch} came to a stage of epoch {self.spec.epoch}.")
        try:
            self._apply_edits(frame)
            if frame.error is not None:
                self._break(frame.step, frame.error.sentence)
            if frame.error is not None or frame.step is None:
                return self._onward(frame, (), ())
            return self._onward(frame, *self._compute(frame.step, frame.tensors))
        except MacpipeError as error:
            self._break(frame.step, error.sentence)
            raise

    def _break(self, step: Step | None, why: str) -> None:
        if step is not None:
            self._table.mark_broken(step.sequences, f"a step of it failed: {why}")

    def _onward(self, frame: Frame, tensors: tuple[Tensor, ...], samples: tuple[Sample, ...]) -> Frame:
        if self.spec.last:
            return replace(frame, edits=(), step=None, tensors=(), samples=samples)
        return replace(frame, tensors=tensors)

    def _apply_edits(self, frame: Frame) -> None:
        before = self._table.sequences + self._table.prefixes
        try:
            self._table.apply(frame.edits)
        except BadFrame:
            if frame.error is None:  # else the stage that gave up has refused the same edit, and said so
                raise
        finally:
            if self._table.sequences + self._table.prefixes < before:
                mx.clear_cache()

    def _compute(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Sample, ...]]:
        """Check everything that can be checked, then run. -> tensors for the next stage, samples for the reply."""
        part = self._loaded()
        live, row = self._checked(step)
        incoming = unpack(tensors, part.inlet, len(step.sequences), len(row))
        try:
            result = self._run(part, live, step, incoming)
        except Exception as error:  # whatever MLX or the model's code raises: this sequence ends, the stage goes on
            raise self._failure(live, error) from error
        self._tidy(step)
        return result

    def _loaded(self) -> ModelSlice:
        if self._slice is None:
            raise StageFailed("This stage has been closed.")
        return self._slice

    def _checked(self, step: Step) -> tuple[LiveSequence, tuple[int, ...]]:
        """The step's one sequence and its tokens."""
        if len(step.sequences) != 1 or len(step.tokens) != 1:
            raise BadFrame(f"A step names {len(step.sequences)} sequences; this version computes one sequence a step.")
        live, row = self._table.usable(step.sequences[0]), step.tokens[0]
        if not row:
            raise BadFrame(f"A step of sequence {live.id} has no tokens.")
        if min(row) < 0 or max(row) >= self._vocabulary:
            raise BadFrame(f"A step names tokens {min(row)} to {max(row)}; the model has 0 to {self._vocabulary - 1}.")
        if len(live.tokens) + len(row) > self.spec.max_context:
            raise BadFrame(f"Sequence {live.id} would grow past the {self.spec.max_context} tokens of this plan.")
        return live, row

    def _run(
        self, part: ModelSlice, live: LiveSequence, step: Step, incoming: list[mx.array]
    ) -> tuple[tuple[Tensor, ...], tuple[Sample, ...]]:
        outgoing = part.run(mx.array(step.tokens), live.caches, incoming)
        live.tokens.extend(step.tokens[0])
        if self.spec.last:
            return (), self._sampled(live, step, outgoing[0])
        sent = [mx.contiguous(array) for array in outgoing]
        mx.eval(sent, live.caches.arrays())
        return tuple(pack(array) for array in sent), ()

    def _sampled(self, live: LiveSequence, step: Step, logits: mx.array) -> tuple[Sample, ...]:
        """Evaluate the step and pick its tokens; a prefill leaves the head uncomputed."""
        end, length = len(live.tokens), logits.shape[1]
        first = {Compute.PREFILL: length, Compute.DECODE: length - 1, Compute.VERIFY: 0}[step.compute]
        positions = [(i, end - length + i + 1) for i in range(first, length)]
        picks = [(at, live.sampler.pick(logits[:, i, :], live.tokens, at)) for i, at in positions]
        mx.eval([pick.arrays() for _, pick in picks], live.caches.arrays())
        return tuple(_sample(live, pick, at) for at, pick in picks)

    def _failure(self, live: LiveSequence, error: Exception) -> StageFailed:
        what = error.sentence if isinstance(error, MacpipeError) else f"{type(error).__name__}: {error}"
        where = f"Stage {self.spec.index} (layers {self.spec.layers})"
        return StageFailed(f"{where} could not compute a step of sequence {live.id}: {what}")

    def _tidy(self, step: Step) -> None:
        """Give MLX's spare buffers back after each prefill chunk and every so many steps, as mlx-lm does."""
        self._steps += 1
        if step.compute is Compute.PREFILL or self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()


def _sample(live: LiveSequence, pick: Picked, position: int) -> Sample:
    if not mx.isfinite(pick.norm).item():
        raise StageFailed(f"the model's output at position {position} is not a number")
    logprob, top = live.sampler.alternatives(pick)
    token: Any = pick.token.item()
    return Sample(live.id, position, token, logprob, top)


def _no_caches() -> NoReturn:
    raise StageFailed("This stage has been closed.")
