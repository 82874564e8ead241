"""Samples the tokens of one step, each position with the settings of its sequence.

Greedy positions share one argmax; the others are sampled one by one. It knows positions and samplers, nothing of caches
or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import mlx.core as mx

from cluster.core.errors import MacpipeError, StageFailed
from cluster.core.frames import Sample, SequenceFailure
from cluster.model.sampler import Picked, greedy
from cluster.model.sequences import LiveSequence

__all__ = ["BatchSampling", "defer", "sample_deferred", "sample_row", "sample_rows"]


class BatchSampling:
    """Holds the lazy samples of one step: evaluate ``arrays()``, then call ``results()``.

    ``logits`` [positions, vocabulary] belong to ``asked``: pairs of a sequence and the position to sample, which is the
    number of tokens before it.
    """

    def __init__(self, asked: Sequence[tuple[LiveSequence, int]], logits: mx.array) -> None:
        self._asked = asked
        self._plain = [i for i, (live, _) in enumerate(asked) if live.sampler.plain]
        self._shared = greedy(_rows(logits, self._plain)) if self._plain else None
        self._failures: dict[int, SequenceFailure] = {}
        self._own = {
            i: picked
            for i, (live, at) in enumerate(asked)
            if not live.sampler.plain and (picked := self._pick(i, live, logits[i : i + 1], at))
        }

    def _pick(self, i: int, live: LiveSequence, logits: mx.array, at: int) -> Picked | None:
        """Sample one position. If the grammar fails, record a failure of this position alone and return None."""
        try:
            return live.sampler.pick(logits, live.tokens, at)
        except MacpipeError as error:
            self._failures[i] = SequenceFailure(live.id, error.reason, error.sentence)
            return None

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate before ``results()``."""
        shared = [] if self._shared is None else self._shared.arrays()
        return [*shared, *(array for sampled in self._own.values() for array in sampled.arrays())]

    def results(self) -> list[Sample | SequenceFailure]:
        """Return the sample of each position, or its failure: a non-finite output or a grammar that failed."""
        shared = dict(zip(self._plain, _pairs(self._shared), strict=True))
        found: list[Sample | SequenceFailure] = []
        for i, (live, at) in enumerate(self._asked):
            if failure := self._failures.get(i):
                found.append(failure)
                continue
            token, norm = shared[i] if i in shared else _pairs(self._own[i])[0]
            found.append(self._describe(i, live, at, token) if isfinite(norm) else _failure(live.id, at))
        return found

    def _describe(self, i: int, live: LiveSequence, at: int, token: int) -> Sample | SequenceFailure:
        logprob, top = live.sampler.alternatives(self._own[i]) if i in self._own else (None, ())
        try:
            ahead = live.sampler.look_ahead(at, token)
        except MacpipeError as error:  # a grammar failure concerns this sequence alone
            return SequenceFailure(live.id, error.reason, error.sentence)
        return Sample(live.id, at, token, logprob, top, ahead.complete, ahead.forced)


def sample_row(live: LiveSequence, logits: mx.array, states: Sequence[mx.array]) -> list[Sample | SequenceFailure]:
    """Sample the last positions of one sequence, of which all but the first follow guesses. Evaluate ``states`` too.

    ``logits`` [positions, vocabulary] belong to the last of its ``tokens``. The result ends with the first sample that
    is not the token fed behind it, that completes the grammar, or that fails: what follows would come after a wrong
    guess. A grammar is followed position by position, since it can neither follow wrong guesses nor go back for free.
    """
    count = logits.shape[0]
    first = len(live.tokens) - count + 1
    at_once = 1 if live.sampler.bound else count
    found: list[Sample | SequenceFailure] = []
    for at in range(0, count, at_once):
        sampling = BatchSampling([(live, first + at + i) for i in range(at_once)], logits[at : at + at_once])
        mx.eval(sampling.arrays(), states)
        for result in sampling.results():
            found.append(result)
            if not _goes_on(live, result):
                return found
    return found


def defer(rows: Sequence[LiveSequence], logits: mx.array, sampled: int) -> list[int]:
    """Keep the logits of the last ``sampled`` positions of each row that cannot be sampled yet.

    Return the indices of the other rows.
    """
    ready = [i for i, live in enumerate(rows) if live.sampler.ready]
    waiting = [i for i in range(len(rows)) if i not in ready]
    for i in waiting:
        rows[i].deferred = mx.contiguous(logits[i : i + 1, logits.shape[1] - sampled :, :])
    return ready


def sample_deferred(live: LiveSequence) -> tuple[tuple[Sample, ...], tuple[SequenceFailure, ...]]:
    """Sample a row's deferred logits and forget them."""
    logits, live.deferred = live.deferred, None
    assert logits is not None
    return sample_rows([live], logits, logits.shape[1], ())


def sample_rows(
    rows: Sequence[LiveSequence], logits: mx.array, sampled: int, states: Sequence[mx.array]
) -> tuple[tuple[Sample, ...], tuple[SequenceFailure, ...]]:
    """Sample the last position of each row, or the last ``sampled`` ones of a single row. Evaluate ``states`` too."""
    if sampled > 1:
        found = sample_row(rows[0], logits[0, logits.shape[1] - sampled :], states)
    else:
        sampling = BatchSampling([(live, len(live.tokens)) for live in rows], logits[:, -1])
        mx.eval(sampling.arrays(), states)
        found = sampling.results()
    samples = tuple(result for result in found if isinstance(result, Sample))
    return samples, tuple(result for result in found if isinstance(result, SequenceFailure))


def _goes_on(live: LiveSequence, result: Sample | SequenceFailure) -> bool:
    """Return whether the token that was fed behind a sample is that sample."""
    if isinstance(result, SequenceFailure) or result.final:
        return False
    return result.position < len(live.tokens) and live.tokens[result.position] == result.token


def _failure(sequence: int, position: int) -> SequenceFailure:
    return SequenceFailure(sequence, StageFailed.reason, f"the model's output at position {position} is not finite")


def _rows(flat: mx.array, rows: list[int]) -> mx.array:
    return flat if len(rows) == flat.shape[0] else flat[mx.array(rows)]


def _pairs(picked: Picked | None) -> list[tuple[int, float]]:
    """Return token and log-sum-exp of each row of an evaluated ``Picked``."""
    if picked is None:
        return []
    tokens: Any = picked.token.tolist()  # a reshape would need another evaluation and wait for the device again
    norms: Any = picked.norm.tolist()
    return [(token, norm) for token, (norm,) in zip(tokens, norms, strict=True)]
