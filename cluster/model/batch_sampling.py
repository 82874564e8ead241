"""Samples the tokens of one step, each row with the settings of its sequence.

Greedy rows share one argmax; the other rows are sampled one by one. It knows rows and samplers, nothing of caches or
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import mlx.core as mx

from cluster.core.errors import MacpipeError, StageFailed
from cluster.core.frames import Sample, SequenceFailure
from cluster.model.grammars import LookAhead
from cluster.model.sampling import Picked, greedy
from cluster.model.sequences import LiveSequence

__all__ = ["BatchSampling"]


class BatchSampling:
    """Holds the lazy samples of one step: evaluate ``arrays()``, then call ``results()``.

    ``logits`` [rows, length, vocabulary] belong to ``rows``, whose ``tokens`` already include those of the step. The
    last ``sampled`` positions of each row are sampled.
    """

    def __init__(self, rows: Sequence[LiveSequence], logits: mx.array, sampled: int) -> None:
        self._asked = [(live, len(live.tokens) - sampled + 1 + i) for live in rows for i in range(sampled)]
        _, length, vocabulary = logits.shape
        flat = logits[:, length - sampled :, :].reshape(len(self._asked), vocabulary)
        self._plain = [i for i, (live, _) in enumerate(self._asked) if live.sampler.plain]
        self._shared = greedy(_rows(flat, self._plain)) if self._plain else None
        self._failures: dict[int, SequenceFailure] = {}
        self._own = {
            i: picked
            for i, (live, at) in enumerate(self._asked)
            if not live.sampler.plain and (picked := self._pick(live, flat[i : i + 1], at, guessed=sampled > 1))
        }

    def _pick(self, live: LiveSequence, logits: mx.array, at: int, *, guessed: bool) -> Picked | None:
        """Sample one position. If the grammar fails, record a failure of this sequence alone and return None."""
        try:
            return live.sampler.pick(logits, live.tokens, at, guessed=guessed)
        except MacpipeError as error:
            self._failures.setdefault(live.id, SequenceFailure(live.id, error.reason, error.sentence))
            return None

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate before ``results()``."""
        shared = [] if self._shared is None else self._shared.arrays()
        return [*shared, *(array for sampled in self._own.values() for array in sampled.arrays())]

    def results(self) -> tuple[tuple[Sample, ...], tuple[SequenceFailure, ...]]:
        """Return the samples, row by row, and the failures: a non-finite output or a grammar that failed."""
        shared = dict(zip(self._plain, _pairs(self._shared), strict=True))
        samples: list[Sample] = []
        failures = dict(self._failures)
        for i, (live, at) in enumerate(self._asked):
            if live.id in failures:
                continue
            token, norm = shared[i] if i in shared else _pairs(self._own[i])[0]
            if not isfinite(norm):
                failures[live.id] = _failure(live.id, at)
            else:
                logprob, top = live.sampler.alternatives(self._own[i]) if i in self._own else (None, ())
                try:
                    last = at == len(live.tokens)
                    ahead = live.sampler.look_ahead(live.tokens, token) if last else LookAhead()
                except MacpipeError as error:  # a grammar failure concerns this sequence alone
                    failures[live.id] = SequenceFailure(live.id, error.reason, error.sentence)
                    continue
                samples.append(Sample(live.id, at, token, logprob, top, ahead.complete, ahead.forced))
        return tuple(s for s in samples if s.sequence not in failures), tuple(failures.values())


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
