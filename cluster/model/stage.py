"""Executes frames on one stage: a slice of the model and the caches of every live sequence.

It knows frames and the slice. It knows nothing of where frames come from or who waits for them: it uses no network, no
clock and no threads. One thread per process loads and steps it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import mlx.core as mx

from cluster.core.adapter import AdapterRef
from cluster.core.errors import BadFrame, InvalidOption, MacpipeError, RankFailed, StageFailed, StaleEpoch
from cluster.core.frames import Compute, Frame, Sample, SequenceFailure, Step, Tensor
from cluster.core.limits import LATE_ROWS
from cluster.core.plan import StageSpec
from cluster.core.request import PromptLogprobs
from cluster.model.adapters import LoraLayers
from cluster.model.batch_sampling import defer, sample_deferred, sample_rows
from cluster.model.caches import HeldCaches, SequenceCaches
from cluster.model.grammar_compiler import GrammarCompiler
from cluster.model.loading import load_slice
from cluster.model.process_group import Lockstep, as_rank, settle_sums
from cluster.model.prompt_scoring import require_valid_scoring, score_prompt
from cluster.model.sequences import LiveSequence, PrefixStore, SequenceTable
from cluster.model.sharding import Group
from cluster.model.slice import ModelSlice
from cluster.model.step_checks import require_rows, require_valid_guesses
from cluster.model.tensor_codec import pack, unpack
from cluster.model.tokenizer import load_tokenizer
from cluster.model.trace import Boundary

__all__ = ["Stage", "load_stage"]

STEPS_BETWEEN_CLEARS: Final = 256
"""Steps between two clears of MLX's buffer cache, as in mlx-lm. Clearing after each prefill chunk as well would make a
GPU free memory and allocate it again for the next chunk."""


@dataclass(frozen=True, slots=True)
class _Result:
    """The output of a step: tensors for the next stage, or what the last stage reports."""

    tensors: tuple[Tensor, ...] = ()
    samples: tuple[Sample, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None


def load_stage(
    spec: StageSpec,
    path: Path,
    progress: Callable[[int, int], None],
    store: PrefixStore | None = None,
    group: Group | None = None,
) -> Stage:
    """Load the stage that ``spec`` describes from the checkpoint in ``path``, reading only the stage's own tensors.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each layer. ``store`` keeps
    prefixes on disk; None if none does. In a ``group``, the stage is the part of its rank, and every rank has to be
    given the same frames in the same order. Raises ModelDiffers, NoPlan (a cut that is not clean, ranks that cannot
    share the layers), ModelNotFound, BadCheckpoint, ModelUnsupported or InvalidOption (``kv_bits``).
    """
    samples = spec.last and (group is None or group.rank() == 0)
    grammars = GrammarCompiler(lambda: load_tokenizer(path).grammars()) if samples else None
    try:
        return Stage(spec, *load_slice(spec, path, progress, group), grammars, store, group)
    except BaseException:
        if grammars:
            grammars.close()
        raise


class Stage:
    """A loaded stage. Not thread-safe: only the thread that loaded it may use it.

    ``weight_bytes`` is the size of its weights. ``grammars`` compiles the grammars of answers on the last stage; the
    stage closes it. In a ``group``, its slice is the part of one rank. Ranks wait for each other within a step, so what
    they compute depends on the frames alone, not on what was sampled or when. Only rank 0 samples.
    """

    def __init__(
        self,
        spec: StageSpec,
        part: ModelSlice,
        vocabulary: int,
        weight_bytes: int,
        grammars: GrammarCompiler | None = None,
        store: PrefixStore | None = None,
        group: Group | None = None,
    ) -> None:
        self.spec = spec
        self._group = group
        self._lockstep = Lockstep(group) if group else None
        self._store = store
        self._grammars = grammars
        self.weight_bytes = weight_bytes
        self._slice: ModelSlice | None = part
        self._vocabulary = vocabulary
        self._adapters: dict[str, LoraLayers] = {}
        self._table = self._new_table(part)
        self._steps = 0

    def _new_table(self, part: ModelSlice) -> SequenceTable:
        return SequenceTable(part.new_caches, self._vocabulary, self._grammars, self._store, self._adapters)

    @property
    def inlet(self) -> Boundary | None:
        """Return the description of the incoming arrays; None on the first stage."""
        return self._require_loaded().inlet

    @property
    def batchable(self) -> bool:
        """Return whether a step may have several sequences."""
        return self._require_loaded().batchable

    @property
    def sequences(self) -> int:
        """Return the number of live sequences."""
        return self._table.sequences

    @property
    def prefixes(self) -> int:
        """Return the number of kept prefixes."""
        return self._table.prefixes

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the caches of sequences and prefixes."""
        return self._table.cache_bytes

    @property
    def prefix_bytes(self) -> int:
        """Return the bytes of the kept prefixes alone; a prefix saved under two ids counts once."""
        return self._table.prefix_bytes

    def close(self) -> None:
        """Free weights and caches. All later steps raise StageFailed."""
        self._slice = None
        self._adapters.clear()
        if self._grammars:
            self._grammars.close()
        self._table = SequenceTable(_no_caches, self._vocabulary)
        gc.collect()  # a slice's replaced calls refer back to it: only the collector frees such a cycle
        mx.clear_cache()

    def begin_epoch(self, spec: StageSpec) -> None:
        """Serve the same layers in a new plan's epoch: keep the weights, drop sequences and prefixes.

        Raises StaleEpoch if ``spec`` has another model, other layers or other bits: that needs a new load.
        """
        if spec.load_key != self.spec.load_key:
            raise StaleEpoch(
                f"this stage holds layers {self.spec.layers} of {self.spec.model.name}, not those of the new plan; "
                "load it again"
            )
        self.spec = spec
        self._table = self._new_table(self._require_loaded())
        mx.clear_cache()

    @property
    def adapters(self) -> frozenset[str]:
        """Return the keys of the loaded adapters."""
        return frozenset(self._adapters)

    def set_adapters(self, wanted: Mapping[str, AdapterRef]) -> None:
        """Load those of the adapters, by key, that are not loaded, and drop all others.

        ``path`` of each is its folder on this machine. A live sequence keeps an adapter that is dropped until it
        leaves. Raises as ``ModelSlice.load_adapter``, and InvalidOption if Macs share the layers; the adapters that
        were loaded before then stay.
        """
        part = self._require_loaded()
        if wanted and self._group:
            raise InvalidOption("adapters cannot be used where several Macs share layers", field="adapter")
        more = {
            key: part.load_adapter(Path(ref.path), ref.fingerprint)
            for key, ref in wanted.items()
            if key not in self._adapters
        }
        part.use_adapter(None)
        for key in self._adapters.keys() - wanted.keys():
            del self._adapters[key]
        self._adapters |= more
        mx.clear_cache()

    def new_caches(self) -> SequenceCaches:
        """Create empty caches for one sequence."""
        return self._require_loaded().new_caches()

    def add_prefix(self, prefix: int, tokens: tuple[int, ...], caches: SequenceCaches, adapter: str) -> None:
        """Keep a prefix whose caches were read from a disk, between two frames. ``adapter`` is its adapter's key."""
        self._table.add_prefix(prefix, tokens, caches, adapter)

    def step(self, frame: Frame) -> Frame:
        """Apply the frame's edits in order, compute its step, and return the frame for the next stage.

        The last stage returns the reply (samples, failures and log-probabilities of the prompt; no edits, no step). A
        frame that carries an error, or is void, is passed on with its edits applied and its step not computed. A step
        of guesses is void here if what it continues was void, or if the last stage, not grouped, has sampled another
        token.

        A row whose grammar is not compiled yet is not sampled: it has neither sample nor failure in this reply. Its
        sample is in the reply to a later frame, whatever this frame is for.

        A row of several guesses is answered up to its first wrong one. The rows of guesses behind that stay in the
        caches until a trim.

        Raises StaleEpoch before any edit is applied. Raises BadFrame for an invalid frame and StageFailed if the
        model's forward fails; edits are applied in both cases. After an error the sequences of the step are rejected
        until they leave: only some stages have computed the step, and continuing would give wrong tokens.

        If only some sequences have a non-finite output, each of them is among the failures and is rejected until it
        leaves. If all have one, StageFailed is raised.
        """
        if frame.epoch != self.spec.epoch:
            raise StaleEpoch(f"the frame has epoch {frame.epoch}, but this stage has epoch {self.spec.epoch}")
        try:
            self._apply_edits(frame)
            if frame.error is not None:
                self._break(frame.step, frame.error.sentence)
                return self._onward(frame, _Result())
            if frame.void or (frame.step and frame.step.guesses and self._is_void(frame.step)):
                return self._onward(replace(frame, void=True), self._add_deferred(_Result()))
            result = self._compute(frame.lane, frame.step, frame.tensors) if frame.step else _Result()
            return self._onward(frame, self._add_deferred(result))
        except MacpipeError as error:
            self._break(frame.step, error.sentence)
            raise

    def _break(self, step: Step | None, why: str) -> None:
        if step is not None:
            self._table.mark_broken(step.sequences, f"one of its steps failed: {why}")

    def _is_void(self, step: Step) -> bool:
        """Return whether all tokens of a step are guesses that are known to be of no use. Raises BadFrame."""
        require_valid_guesses(step)
        live = self._table.usable(step.sequences[0])
        if not step.guessed:
            return False
        follows_void = (step.start or 0) > len(live.tokens)
        knows_sample = self.spec.last and self._group is None
        return follows_void or (knows_sample and live.sampled != (step.start, step.tokens[0][0]))

    def _onward(self, frame: Frame, result: _Result) -> Frame:
        if self.spec.last:
            return replace(
                frame,
                edits=(),
                step=None,
                tensors=result.tensors,
                samples=result.samples,
                failures=result.failures,
                prompt_logprobs=result.prompt_logprobs,
            )
        return replace(frame, tensors=result.tensors)

    def _apply_edits(self, frame: Frame) -> None:
        try:
            self._table.apply(frame.edits, frame.step.sequences if frame.step else ())
        except BadFrame:
            if frame.error is None:  # otherwise the stage that failed has reported this edit already
                raise

    def _compute(self, lane: int, step: Step, tensors: tuple[Tensor, ...]) -> _Result:
        """Validate the step and its tensors, then run it."""
        part = self._require_loaded()
        rows = self._check_rows(part, step)
        incoming = unpack(tensors, part.inlet, len(rows), len(step.tokens[0]))
        try:
            if self._lockstep:
                self._lockstep.meet()
            result = self._run(part, lane, rows, step, incoming)
            result = self._draft(part, lane, rows, step, result)
        except RankFailed:
            raise
        except Exception as error:  # MLX or model code may raise anything; it must end only these sequences
            raise self._failure(rows, error) from error
        for failure in result.failures:
            self._mark_broken([failure.sequence], failure.sentence)
        self._tidy()
        return result

    def _mark_broken(self, sequences: Sequence[int], why: str) -> None:
        """Reject sequences whose sampling failed. In a group only rank 0 knows, and must compute what the others do."""
        if self._group is None:
            self._table.mark_broken(sequences, why)

    def _eval(self, *arrays: object) -> None:
        """Evaluate what a step has computed; in a group, together with the other ranks."""
        with as_rank(self._group):
            mx.eval(*arrays, [self._lockstep.noted] if self._lockstep else [])

    def _require_loaded(self) -> ModelSlice:
        if self._slice is None:
            raise StageFailed("this stage has been closed")
        return self._slice

    def _check_rows(self, part: ModelSlice, step: Step) -> list[LiveSequence]:
        """Return the step's sequences, row by row. Raises BadFrame if the step is invalid."""
        require_rows(step)
        if len(step.sequences) > 1 and not part.batchable:
            raise BadFrame(
                f"the step has {len(step.sequences)} sequences, but this model's caches cannot share a batch"
            )
        low = min(map(min, step.tokens))
        high = max(map(max, step.tokens))
        if low < 0 or high >= self._vocabulary:
            raise BadFrame(f"the step has tokens {low} to {high}, but the model has 0 to {self._vocabulary - 1}")
        require_valid_scoring(step, self._vocabulary)
        is_whole = self.spec.first and self.spec.last and self._group is None
        if step.drafts > 1 and (len(step.sequences) > 1 or not is_whole):
            raise BadFrame("only a stage that holds the whole model can draft, and for one sequence at a time")
        rows = [self._table.usable(sequence) for sequence in step.sequences]
        for live in rows:
            if live.deferred is not None:
                refusal = RankFailed if self._group else BadFrame  # the other ranks know nothing of it
                raise refusal(f"sequence {live.id} takes a step, but its last one waits for its grammar")
            if step.start not in (None, len(live.tokens)):
                raise BadFrame(f"the step starts at token {step.start} of sequence {live.id}, not {len(live.tokens)}")
            if len(live.tokens) + len(step.tokens[0]) > self.spec.max_context:
                raise BadFrame(f"sequence {live.id} would grow past the {self.spec.max_context} tokens of this plan")
            if live.adapter_key != rows[0].adapter_key:
                raise BadFrame("the step has sequences of several adapters")
        return rows

    def _run(
        self, part: ModelSlice, lane: int, rows: list[LiveSequence], step: Step, incoming: list[mx.array]
    ) -> _Result:
        for live in rows:
            self._table.mark_guesses(live, step)
        caches = self._table.gather(lane, step.sequences)
        part.use_adapter(rows[0].adapter)
        outgoing, state = self._forward(part, rows, step, caches, incoming)
        for live, tokens in zip(rows, step.tokens, strict=True):
            live.feed(tokens)
        if self.spec.last:
            embeds = any(live.embeds for live in rows)
            vectors = state[:, -1].astype(mx.float32) if embeds and state is not None else None
            states = caches.arrays() if vectors is None else [*caches.arrays(), vectors]
            return _add_vectors(self._evaluate_and_sample(rows, step, outgoing[0], states), rows, vectors)
        sent = [mx.contiguous(array) for array in outgoing]
        if self._lockstep:
            self._lockstep.note(sent)
        self._eval(sent, caches.arrays())
        return _Result(tensors=tuple(pack(array) for array in sent))

    def _forward(
        self, part: ModelSlice, rows: list[LiveSequence], step: Step, caches: HeldCaches, incoming: list[mx.array]
    ) -> tuple[list[mx.array], mx.array | None]:
        """Run the slice. Return also the hidden states of a decode step, if anybody needs them.

        Ranks compare them, not the logits: those come from a head that each rank has for itself.
        """
        tokens = mx.array(step.tokens)
        if self._group and step.compute is Compute.PREFILL:
            with as_rank(self._group), settle_sums():
                return part.run(tokens, caches, incoming), None
        decodes_last = self.spec.last and step.compute is Compute.DECODE
        if not (decodes_last and (self._lockstep or any(live.embeds for live in rows))):
            return part.run(tokens, caches, incoming), None
        outgoing, state = part.run_with_state(tokens, caches, incoming)
        if self._lockstep and state is not None:
            self._lockstep.note([state])
        return outgoing, state

    def _draft(self, part: ModelSlice, lane: int, rows: list[LiveSequence], step: Step, result: _Result) -> _Result:
        """Feed the sample of a step that drafts, then the sample after that, and so on. Return all samples."""
        samples = list(result.samples)
        while 0 < len(samples) < step.drafts and len(rows[0].tokens) < self.spec.max_context:
            fed = Step(Compute.DECODE, step.sequences, ((samples[-1].token,),))
            result = self._run(part, lane, rows, fed, [])
            if not result.samples:
                break
            samples += result.samples
        return replace(result, samples=tuple(samples))

    def _evaluate_and_sample(
        self, rows: list[LiveSequence], step: Step, logits: mx.array, states: list[mx.array]
    ) -> _Result:
        """Evaluate the step and sample its tokens. For a prefill, compute the head only if it has a ``scoring``."""
        if step.compute is Compute.PREFILL:
            return self._evaluate_prefill(rows[0], step, logits, states)
        if self._group:
            self._eval(logits, states)  # the same on all ranks, whatever can be sampled on one of them by now
            return _Result() if self._group.rank() else self._sample_apart(rows, step, logits)
        if any(live.sampler.bound for live in rows):
            mx.async_eval(logits, states)  # type: ignore[no-untyped-call]  # computes while the masks are made
        return self._sample_step(rows, step, logits, states)

    def _evaluate_prefill(self, live: LiveSequence, step: Step, logits: mx.array, states: list[mx.array]) -> _Result:
        scoring = step.scoring
        if scoring is None:
            self._eval(states)
            return _Result()
        self._eval(logits, states)
        start = len(live.tokens) - len(step.tokens[0]) + scoring.skip + 1
        return _Result(prompt_logprobs=score_prompt(logits, scoring, start))

    def _sample_apart(self, rows: list[LiveSequence], step: Step, logits: mx.array) -> _Result:
        """Sample what a group has computed. A failure ends only these sequences: all ranks have done the step."""
        try:
            return self._sample_step(rows, step, logits, [])
        except Exception as error:  # as in ``_compute``
            failed = self._failure(rows, error)
            return _Result(failures=tuple(SequenceFailure(live.id, failed.reason, failed.sentence) for live in rows))

    def _sample_step(self, rows: list[LiveSequence], step: Step, logits: mx.array, states: list[mx.array]) -> _Result:
        """Sample the tokens of a step that may be yet to be evaluated."""
        ready = defer(rows, logits, step.sampled)
        deferred = [live.deferred for live in rows if live.deferred is not None]
        if not ready:
            mx.eval(states, deferred)
            return _Result()
        logits = logits if len(ready) == len(rows) else logits[mx.array(ready)]
        samples, failures = sample_rows([rows[i] for i in ready], logits, step.sampled, [*states, *deferred])
        if not samples and len(failures) == len(rows) and all(f.reason == StageFailed.reason for f in failures):
            raise StageFailed(failures[0].sentence)
        return _Result(samples=samples, failures=failures)

    def _add_deferred(self, result: _Result) -> _Result:
        """Sample the deferred rows whose grammar has been compiled meanwhile. Whatever fails is its own row's failure.

        Return ``result`` with their samples and failures, and note all samples of this frame.
        """
        samples, failures = list(result.samples), list(result.failures)
        for live in self._table.deferred(LATE_ROWS):
            try:
                more, failed = sample_deferred(live)
            except Exception as error:  # MLX may raise anything; the frame's own rows have their samples
                failure = self._failure([live], error)
                more, failed = (), (SequenceFailure(live.id, failure.reason, failure.sentence),)
            samples += more
            failures += failed
            self._mark_broken([f.sequence for f in failed], failed[0].sentence if failed else "")
        self._table.note_samples(samples)
        return replace(result, samples=tuple(samples), failures=tuple(failures))

    def _failure(self, rows: Sequence[LiveSequence], error: Exception) -> StageFailed:
        what = error.sentence if isinstance(error, MacpipeError) else f"{type(error).__name__}: {error}"
        where = f"stage {self.spec.index} (layers {self.spec.layers})"
        of = ", ".join(str(live.id) for live in rows)
        return StageFailed(f"{where} could not compute a step of sequence {of}: {what}")

    def _tidy(self) -> None:
        """Clear MLX's spare buffers every ``STEPS_BETWEEN_CLEARS`` steps. The device's cache limit also bounds them."""
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CLEARS == 0:
            mx.clear_cache()


def _add_vectors(result: _Result, rows: Sequence[LiveSequence], vectors: mx.array | None) -> _Result:
    """Add the evaluated hidden states [rows, width] of the sampled rows that embed, with their sequences' ids."""
    sampled = {sample.sequence for sample in result.samples}
    wanted = [i for i, live in enumerate(rows) if live.embeds and live.id in sampled]
    if vectors is None or not wanted:
        return result
    ids, chosen = mx.array([rows[i].id for i in wanted], dtype=mx.int64), mx.contiguous(vectors[mx.array(wanted)])
    mx.eval(ids, chosen)
    return replace(result, tensors=(pack(ids), pack(chosen)))


def _no_caches() -> NoReturn:
    raise StageFailed("this stage has been closed")
