"""One stage: frames in, frames out. It holds a slice of the model and the caches of every live sequence.

It knows the frame and the slice. It refuses to know where frames come from, when, or who waits for them: no network,
no clock, no thread. One thread per process loads it and steps it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import mlx.core as mx

from cluster.core.errors import BadFrame, MacpipeError, StageFailed, StaleEpoch
from cluster.core.frames import Compute, Frame, Sample, SequenceFailure, Step, Tensor
from cluster.core.plan import LayerRange, StageSpec
from cluster.model.batch_sampling import BatchSampling
from cluster.model.grammar_compiler import GrammarCompiler
from cluster.model.loading import load_slice
from cluster.model.sequences import LiveSequence, SequenceTable
from cluster.model.slice import ModelSlice
from cluster.model.tensor_codec import pack, unpack
from cluster.model.tokenizer import load_tokenizer
from cluster.model.trace import Boundary

__all__ = ["Stage", "load_stage"]

STEPS_BETWEEN_CLEARS: Final = 256
"""Steps after which MLX's buffer cache is emptied, as mlx-lm does. After each prefill chunk too would cost a GPU the
time to free, and to ask again for, what the next chunk needs."""


@dataclass(frozen=True, slots=True)
class _Result:
    """What a step made: tensors for the next stage, or the last stage's samples and failures."""

    tensors: tuple[Tensor, ...] = ()
    samples: tuple[Sample, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()


def load_stage(spec: StageSpec, path: Path, progress: Callable[[int, int], None]) -> Stage:
    """Build the stage that ``spec`` describes from the checkpoint in ``path``, reading its own tensors only.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each layer. Raises ModelDiffers,
    NoPlan (a cut that is not clean), ModelNotFound, BadCheckpoint, ModelUnsupported or InvalidOption (``kv_bits``).
    """
    grammars = GrammarCompiler(lambda: load_tokenizer(path).grammars()) if spec.last else None
    try:
        return Stage(spec, *load_slice(spec, path, progress), grammars)
    except BaseException:
        if grammars:
            grammars.close()
        raise


class Stage:
    """A loaded stage. Not thread-safe: only the thread that loaded it may use it.

    ``weight_bytes`` is what its weights take. ``grammars`` compiles what the last stage binds answers with; the stage
    closes it.
    """

    def __init__(
        self,
        spec: StageSpec,
        part: ModelSlice,
        vocabulary: int,
        weight_bytes: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.spec = spec
        self._grammars = grammars
        self.weight_bytes = weight_bytes
        self._slice: ModelSlice | None = part
        self._vocabulary = vocabulary
        self._table = SequenceTable(part.new_caches, vocabulary, grammars)
        self._steps = 0

    @property
    def inlet(self) -> Boundary | None:
        """What comes in; None where the model begins."""
        return self._require_loaded().inlet

    @property
    def batchable(self) -> bool:
        """Whether a step may have several sequences."""
        return self._require_loaded().batchable

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

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the kept prefixes alone; what two ids keep of one state counts once."""
        return self._table.prefix_bytes

    def close(self) -> None:
        """Free weights and caches. Every later step raises StageFailed."""
        self._slice = None
        if self._grammars:
            self._grammars.close()
        self._table = SequenceTable(_no_caches, self._vocabulary)
        gc.collect()  # a slice's replaced calls refer back to it: only the collector frees such a ring
        mx.clear_cache()

    def begin_epoch(self, spec: StageSpec) -> None:
        """Serve the same layers under a new plan's epoch: weights stay, sequences and prefixes go.

        Raises StaleEpoch when ``spec`` wants another model, other layers or other ``kv_bits``: that is a load.
        """
        if _load_key(spec) != _load_key(self.spec):
            raise StaleEpoch(f"this stage holds layers {self.spec.layers} of {self.spec.model.name}; load it anew")
        self.spec = spec
        self._table = SequenceTable(self._require_loaded().new_caches, self._vocabulary, self._grammars)
        mx.clear_cache()

    def step(self, frame: Frame) -> Frame:
        """Apply the frame's edits in order, compute its step, and return the frame for the next stage; the last stage
        returns the reply (samples and failures, no edits, no step).

        Raises StaleEpoch before anything is applied; BadFrame for a frame that asks the impossible; StageFailed when
        the model's forward fails. Edits have been applied then. A frame that carries an error is passed on with its
        edits applied. Either way the sequences of its step are refused until they leave: some stages have computed
        it and some have not, and going on would give wrong tokens. A sequence that alone has an output which is not
        finite is among the failures, and refused likewise; where none has a finite one, that is a StageFailed.
        """
        if frame.epoch != self.spec.epoch:
            raise StaleEpoch(f"a frame of epoch {frame.epoch} came to a stage of epoch {self.spec.epoch}")
        try:
            self._apply_edits(frame)
            if frame.error is not None:
                self._break(frame.step, frame.error.sentence)
            if frame.error is not None or frame.step is None:
                return self._onward(frame, _Result())
            return self._onward(frame, self._compute(frame.lane, frame.step, frame.tensors))
        except MacpipeError as error:
            self._break(frame.step, error.sentence)
            raise

    def _break(self, step: Step | None, why: str) -> None:
        if step is not None:
            self._table.mark_broken(step.sequences, f"a step of it failed: {why}")

    def _onward(self, frame: Frame, result: _Result) -> Frame:
        if self.spec.last:
            return replace(frame, edits=(), step=None, tensors=(), samples=result.samples, failures=result.failures)
        return replace(frame, tensors=result.tensors)

    def _apply_edits(self, frame: Frame) -> None:
        try:
            self._table.apply(frame.edits, frame.step.sequences if frame.step else ())
        except BadFrame:
            if frame.error is None:  # else the stage that gave up has refused the same edit, and said so
                raise

    def _compute(self, lane: int, step: Step, tensors: tuple[Tensor, ...]) -> _Result:
        """Check everything that can be checked, then run."""
        part = self._require_loaded()
        rows = self._checked_rows(part, step)
        incoming = unpack(tensors, part.inlet, len(rows), len(step.tokens[0]))
        try:
            result = self._run(part, lane, rows, step, incoming)
        except Exception as error:  # whatever MLX or the model's code raises: these sequences end, the stage goes on
            raise self._failure(rows, error) from error
        for failure in result.failures:
            self._table.mark_broken([failure.sequence], failure.sentence)
        self._tidy()
        return result

    def _require_loaded(self) -> ModelSlice:
        if self._slice is None:
            raise StageFailed("this stage has been closed")
        return self._slice

    def _checked_rows(self, part: ModelSlice, step: Step) -> list[LiveSequence]:
        """The step's sequences, row by row."""
        _require_rows(step)
        if len(step.sequences) > 1 and not part.batchable:
            raise BadFrame(f"a step names {len(step.sequences)} sequences; this model's caches cannot share a batch")
        low, high = min(map(min, step.tokens)), max(map(max, step.tokens))
        if low < 0 or high >= self._vocabulary:
            raise BadFrame(f"a step names tokens {low} to {high}; the model has 0 to {self._vocabulary - 1}")
        rows = [self._table.usable(sequence) for sequence in step.sequences]
        for live in rows:
            if len(live.tokens) + len(step.tokens[0]) > self.spec.max_context:
                raise BadFrame(f"sequence {live.id} would grow past the {self.spec.max_context} tokens of this plan")
        return rows

    def _run(
        self, part: ModelSlice, lane: int, rows: list[LiveSequence], step: Step, incoming: list[mx.array]
    ) -> _Result:
        caches = self._table.gather(lane, step.sequences)
        outgoing = part.run(mx.array(step.tokens), caches, incoming)
        for live, tokens in zip(rows, step.tokens, strict=True):
            live.feed(tokens)
        if self.spec.last:
            return self._evaluate_and_sample(rows, step, outgoing[0], caches.arrays())
        sent = [mx.contiguous(array) for array in outgoing]
        mx.eval(sent, caches.arrays())
        return _Result(tensors=tuple(pack(array) for array in sent))

    def _evaluate_and_sample(
        self, rows: list[LiveSequence], step: Step, logits: mx.array, states: list[mx.array]
    ) -> _Result:
        """Evaluate the step and pick its tokens; a prefill leaves the head uncomputed."""
        if step.compute is Compute.PREFILL:
            mx.eval(states)
            return _Result()
        if any(live.sampler.bound for live in rows):
            mx.async_eval(logits, states)  # type: ignore[no-untyped-call]  # so that the model computes meanwhile
        picks = BatchSampling(rows, logits, 1 if step.compute is Compute.DECODE else logits.shape[1])
        mx.eval(picks.arrays(), states)
        samples, failures = picks.results()
        if len(failures) == len(rows) and all(f.reason == StageFailed.reason for f in failures):
            raise StageFailed(failures[0].sentence)
        return _Result(samples=samples, failures=failures)

    def _failure(self, rows: Sequence[LiveSequence], error: Exception) -> StageFailed:
        what = error.sentence if isinstance(error, MacpipeError) else f"{type(error).__name__}: {error}"
        where = f"stage {self.spec.index} (layers {self.spec.layers})"
        of = ", ".join(str(live.id) for live in rows)
        return StageFailed(f"{where} could not compute a step of sequence {of}: {what}")

    def _tidy(self) -> None:
        """Give MLX's spare buffers back every so many steps; between, the device's cache limit bounds them."""
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()


def _load_key(spec: StageSpec) -> tuple[str, LayerRange, int]:
    """What of a spec takes a load to change."""
    return spec.model.fingerprint, spec.layers, spec.kv_bits


def _require_rows(step: Step) -> None:
    """Raise BadFrame unless there is a row of tokens, all of one length, for each of different sequences."""
    if not step.sequences or len(set(step.sequences)) != len(step.sequences):
        raise BadFrame(f"a step names {len(step.sequences)} sequences; it must name different ones, at least one")
    lengths = {len(row) for row in step.tokens}
    if len(step.tokens) != len(step.sequences) or len(lengths) != 1:
        raise BadFrame(f"a step of {len(step.sequences)} sequences has {len(step.tokens)} rows of {sorted(lengths)}")
    if lengths == {0}:
        raise BadFrame(f"a step of sequence {step.sequences[0]} has no tokens")


def _no_caches() -> NoReturn:
    raise StageFailed("this stage has been closed")
