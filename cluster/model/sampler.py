"""Samples a token from logits: bias, penalties, log-probabilities, filters, and the random draw.

The arithmetic and its order are those of mlx-lm (``generate_step``: processors, minus log-sum-exp, sampler), so greedy
tokens and log-probabilities are bit-equal to mlx-lm's. There are three differences:

- Penalties use the whole history, kept as one vector that is updated by one scatter per token.
- The filters are not compiled: mlx-lm compiles its filters for every value that a client sends, and keeps them all.
- The draw depends only on (seed, position), so a seed gives the same text with any number of stages, under any load
  and after a recovery.

It knows nothing of frames, caches or layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from cluster.core.errors import InvalidGrammar, StageFailed
from cluster.core.request import Grammar, SamplingParams, TopLogprob
from cluster.model.grammar_compiler import Compilation, GrammarCompiler
from cluster.model.grammars import Constraint, LookAhead

__all__ = ["Picked", "Sampler", "draw_key", "draw_noise", "greedy"]

COLDEST: Final = 1e-5
"""Lower temperatures select the most probable token, since dividing by them overflows."""

LEAST_NOISE: Final = -4.0
"""Below all finite noise. The generator's uniform zero gives minus infinity, which would exclude a token."""


def draw_key(seed: int, position: int) -> mx.array:
    """Return the random key of the token at ``position``: uint32[2], from BLAKE2b-64 of (seed, position).

    Both are encoded as unsigned 64-bit little-endian integers (modulo 2^64). The digest's two little-endian words are
    the key. The generator is counter-based: a draw does not depend on earlier draws.
    """
    counter = b"".join((n % 2**64).to_bytes(8, "little") for n in (seed, position))
    digest = hashlib.blake2b(counter, digest_size=8, person=b"macpipe.draw").digest()
    return mx.array([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")], dtype=mx.uint32)


def draw_noise(seed: int, position: int, width: int) -> mx.array:
    """Return the Gumbel noise of the token at ``position``: float32[1, width], finite.

    The most probable token after the noise was added is a sample of the distribution. The noise of a token depends on
    ``width``, so models that shall draw the same tokens use the same width.
    """
    return mx.maximum(mx.random.gumbel((1, width), key=draw_key(seed, position)), LEAST_NOISE)


@dataclass(frozen=True, slots=True)
class Picked:
    """A sampled token, not evaluated yet.

    ``token`` and ``norm`` (the log-sum-exp) have one element per row. ``logprobs`` [vocabulary] is None unless the
    request asks for log-probabilities.
    """

    token: mx.array
    norm: mx.array
    logprobs: mx.array | None

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate."""
        return [self.token, self.norm, *([] if self.logprobs is None else [self.logprobs])]


def greedy(logits: mx.array) -> Picked:
    """Return the most probable token of each row of ``logits`` [rows, vocabulary], equal to ``Sampler.pick``."""
    norm = mx.logsumexp(logits, axis=-1, keepdims=True)
    return Picked(mx.argmax(logits - norm, axis=-1), norm, None)


class Sampler:
    """Samples the tokens of one sequence. ``vocabulary`` is the number of logits.

    ``forced``: look ahead for tokens that the grammar forces. ``noise`` is the number of tokens that are drawn, if that
    is another: those of a target model, of which a draft model has the same first ones. 0 means ``vocabulary``.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_length: int,
        vocabulary: int,
        grammars: GrammarCompiler | None = None,
        *,
        forced: bool = False,
        noise: int = 0,
    ) -> None:
        self.params = params
        self._forced = forced
        self._noise = noise or vocabulary
        self._prompt_length = prompt_length
        self._grammars = grammars
        self._constraint: Constraint | None = None
        self._compilation: Compilation | None = None
        self._vocabulary = vocabulary
        self._bias = _columns(params.logit_bias)
        self._seen = _Counts(vocabulary, 0) if params.repetition_penalty != 1.0 else None
        penalised = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._answer = _Counts(vocabulary, prompt_length) if penalised else None
        if params.grammar is not None and grammars is not None:
            self._compilation = grammars.begin(params.grammar)  # compiles during the prefill

    @property
    def plain(self) -> bool:
        """Return whether ``greedy`` suffices: only the most probable token is needed, without any adjustment."""
        p = self.params
        adjusted = self._bias is not None or self._seen is not None or self._answer is not None
        return p.temperature < COLDEST and not adjusted and not p.logprobs and not self.bound

    @property
    def bound(self) -> bool:
        """Return whether a grammar restricts the tokens."""
        return self.params.grammar is not None

    @property
    def ready(self) -> bool:
        """Return whether ``pick`` can be called: there is no grammar, or its compilation has ended, well or not."""
        grammar = self.params.grammar
        if grammar is None or self._grammars is None:
            return True
        if self._compilation is None or not self._compilation.done:
            self._compilation = self._grammars.begin(grammar)  # there may have been no room
        return self._compilation is not None and self._compilation.done

    def forget(self) -> None:
        """Reset the token counts and the grammar, after earlier tokens have changed (a restored prefix)."""
        for counts in (self._seen, self._answer):
            if counts is not None:
                counts.reset()
        if self._constraint is not None:
            self._constraint.forget()

    def rewind(self, tokens: Sequence[int], length: int) -> None:
        """Undo what followed ``tokens[:length]``: the rest of ``tokens`` is about to be dropped.

        It costs as much as the dropped tokens, not as all of them.
        """
        for counts in (self._seen, self._answer):
            if counts is not None:
                counts.rewind(tokens, length)
        if self._constraint is not None:
            self._constraint.rewind(length)

    def pick(self, logits: mx.array, tokens: Sequence[int], position: int) -> Picked:
        """Sample the token at ``position`` lazily, from ``logits`` [1, vocabulary] after ``tokens[:position]``.

        The sampler must be ``ready``. Raises InvalidGrammar if the grammar fails, StageFailed if the tokens violate it.
        """
        logits = self._adjust(logits, tokens, position)
        if self.params.grammar is not None:
            logits = self._apply_mask(logits, self._bind(self.params.grammar), tokens, position)
        norm = mx.logsumexp(logits, keepdims=True)
        logprobs = logits - norm
        token = self._draw(logprobs, position)
        return Picked(token, norm, logprobs.squeeze(0) if self.params.logprobs else None)

    def look_ahead(self, position: int, token: int) -> LookAhead:
        """Return what must follow ``token``, which was picked at ``position`` last of all, by the grammar."""
        if self._constraint is None:
            return LookAhead()
        return self._constraint.look_ahead(position, token, forced=self._forced)

    def alternatives(self, picked: Picked) -> tuple[float | None, tuple[TopLogprob, ...]]:
        """Return the token's log-probability and the best alternatives; (None, ()) if they are not requested."""
        if picked.logprobs is None:
            return None, ()
        own: Any = picked.logprobs[picked.token.item()].item()
        return own, _best(picked.logprobs, self.params.top_logprobs)

    def _bind(self, grammar: Grammar) -> Constraint:
        if self._constraint is None:
            if self._grammars is None:
                raise InvalidGrammar(
                    "this stage has no tokenizer, so it cannot apply a grammar; serve a model with a tokenizer"
                )
            if self._compilation is None:
                raise InvalidGrammar("too many other grammars wait to be compiled; try again in a moment")
            self._constraint = self._compilation.constraint(grammar, self._prompt_length)
        if self._compilation:
            self._compilation.masks += 1
        return self._constraint

    def _apply_mask(self, logits: mx.array, constraint: Constraint, tokens: Sequence[int], position: int) -> mx.array:
        """Apply the grammar's mask, after bias and penalties so that they cannot re-enable a forbidden token."""
        allowed = constraint.allowed_mask(tokens, position, self._vocabulary)
        if allowed is None:
            raise StageFailed(f"the answer up to position {position} violates its grammar")
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _adjust(self, logits: mx.array, tokens: Sequence[int], position: int) -> mx.array:
        """Apply bias, then penalties, in mlx-lm's order."""
        p = self.params
        own = logits
        if self._bias is not None:
            ids, biases = self._bias
            logits = _clamp_logits(logits.at[:, ids].add(biases), own)
        if self._seen is not None:
            seen = self._seen.after(tokens, position) > 0
            scaled = mx.where(logits < 0, logits * p.repetition_penalty, logits / p.repetition_penalty)
            logits = _clamp_logits(mx.where(seen, scaled, logits), own)
        if self._answer is not None:
            counts = self._answer.after(tokens, position)
            penalty = p.presence_penalty * (counts > 0) + p.frequency_penalty * counts
            logits = _clamp_logits(logits - penalty.astype(logits.dtype), own)
        return logits

    def _draw(self, logprobs: mx.array, position: int) -> mx.array:
        p = self.params
        if p.temperature < COLDEST:
            return mx.argmax(logprobs, axis=-1)
        if 0 < p.top_p < 1:
            logprobs = _top_p(logprobs, p.top_p)
        if p.min_p > 0:
            logprobs = _min_p(logprobs, p.min_p)
        if 0 < p.top_k < self._vocabulary:
            logprobs = _top_k(logprobs, p.top_k)
        # The maximum is shifted to 0 first: otherwise a low temperature sends a flat distribution to minus infinity.
        above = (logprobs - mx.max(logprobs, axis=-1, keepdims=True)).astype(mx.float32)
        # Not mx.random.categorical: it takes another path for a single row than for several.
        noise = draw_noise(p.seed, position, self._noise)[:, : self._vocabulary]
        drawn = above[:, : self._noise] * (1 / p.temperature) + noise
        return mx.argmax(drawn, axis=-1)


def _clamp_logits(logits: mx.array, own: mx.array) -> mx.array:
    """Return ``logits`` clipped to the range of their type, so that no penalty turns a number into an infinity.

    Non-finite values of the model's ``own`` logits stay: an excluded token, or an output that is not a number.
    """
    most = mx.finfo(logits.dtype).max
    return mx.where(mx.isfinite(own), mx.clip(logits, -most, most), own)


def _top_p(logprobs: mx.array, mass: float) -> mx.array:
    """Keep the most probable tokens whose predecessors hold less than ``mass`` of the probability."""
    best = -mx.sort(-logprobs, axis=-1)
    probabilities = mx.exp(best.astype(mx.float32))
    before = mx.cumsum(probabilities, axis=-1, inclusive=False)
    total = before[..., -1:] + probabilities[..., -1:]
    least = mx.where(before < mass * total, best, best[..., :1]).min(axis=-1, keepdims=True)
    return mx.where(logprobs < least, -float("inf"), logprobs)


def _min_p(logprobs: mx.array, share: float) -> mx.array:
    """Keep tokens that are at least ``share`` times as probable as the best."""
    least = mx.max(logprobs, axis=-1, keepdims=True) + math.log(share)
    return mx.where(logprobs < least, -float("inf"), logprobs)


def _top_k(logprobs: mx.array, count: int) -> mx.array:
    """Keep the ``count`` most probable tokens; argpartition breaks ties."""
    others = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., count:]
    return mx.put_along_axis(logprobs, others, mx.array(-float("inf"), logprobs.dtype), axis=-1)


class _Counts:
    """Counts each token's occurrences from index ``start`` on: float32 [vocabulary], updated by scatters."""

    def __init__(self, vocabulary: int, start: int) -> None:
        self._vocabulary = vocabulary
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self._counts = mx.zeros((self._vocabulary,))
        self._end = self._start

    def after(self, tokens: Sequence[int], position: int) -> mx.array:
        """Return the counts over ``tokens[start:position]``. Only ``rewind`` may go back."""
        if position > self._end:
            new = mx.array(list(tokens[self._end : position]))
            self._counts = self._counts.at[new].add(1)
            self._end = position
        return self._counts

    def rewind(self, tokens: Sequence[int], length: int) -> None:
        """Subtract the counts of ``tokens[length:]``."""
        kept = max(length, self._start)
        if kept < self._end:
            dropped = mx.array(list(tokens[kept : self._end]))
            self._counts = self._counts.at[dropped].add(-1)
            self._end = kept


def _columns(pairs: tuple[tuple[int, float], ...]) -> tuple[mx.array, mx.array] | None:
    return (mx.array([i for i, _ in pairs]), mx.array([bias for _, bias in pairs])) if pairs else None


def _best(logprobs: mx.array, count: int) -> tuple[TopLogprob, ...]:
    """Return the ``count`` most probable tokens, ties by token id; fewer if a grammar allows fewer."""
    if count <= 0:
        return ()
    size = logprobs.shape[-1]
    best = mx.argpartition(-logprobs, kth=count - 1)[:count] if count < size else mx.arange(size)
    ids: Any = best.tolist()
    values: Any = logprobs[best].tolist()
    pairs = zip(ids, values, strict=True)
    ordered = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return tuple(TopLogprob(token, value) for token, value in ordered if math.isfinite(value))
