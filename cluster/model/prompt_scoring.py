"""Computes log-probabilities of prompt tokens from the logits of a prefill step.

The arithmetic is that of ``mlx_lm.evaluate``, a log-softmax in float32, so values are bit-equal to those of one forward
of mlx-lm. Bias, penalties and temperature have no part in it. Positions are handled in slices, since alternatives take
several times the memory of the logits. It knows logits and token ids, nothing of sequences or caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import mlx.core as mx

from cluster.core.errors import BadFrame, StageFailed
from cluster.core.frames import Compute, PromptScoring, Step
from cluster.core.limits import MAX_SCORED_LOGITS, SCORED_SLICE_LOGITS
from cluster.core.request import PromptLogprobs

__all__ = ["require_valid_scoring", "score_prompt"]


def require_valid_scoring(step: Step, vocabulary: int) -> None:
    """Raise BadFrame unless the step can report what its ``scoring`` asks for, if it has one."""
    scoring = step.scoring
    if scoring is None:
        return
    width = len(step.tokens[0])
    if step.compute is not Compute.PREFILL or len(step.sequences) > 1:
        raise BadFrame("only a prefill step of one sequence can report log-probabilities of its prompt")
    if not scoring.targets or scoring.skip + len(scoring.targets) > width:
        raise BadFrame(
            f"the step has {width} positions, of which {scoring.skip} are skipped; it cannot report "
            f"{len(scoring.targets)} log-probabilities"
        )
    if min(scoring.targets) < 0 or max(scoring.targets) >= vocabulary:
        raise BadFrame(f"the step asks for token {max(scoring.targets)}; the model has 0 to {vocabulary - 1}")
    if width > 1 and width * vocabulary > MAX_SCORED_LOGITS:
        raise BadFrame(f"the step reports log-probabilities of {width} tokens, which needs too much memory")


def score_prompt(logits: mx.array, scoring: PromptScoring, start: int) -> PromptLogprobs:
    """Return the log-probabilities of ``scoring.targets``. ``start`` is the first target's index in the prompt.

    ``logits`` has shape [1, length, vocabulary]. Raises StageFailed if the logits of a position are not finite.
    """
    top = min(scoring.top, logits.shape[-1])
    own: list[float] = []
    tokens: list[int] = []
    values: list[float] = []
    for first, targets in _slices(scoring.targets, logits.shape[-1]):
        at = scoring.skip + first
        logprobs = _log_softmax(logits[0, at : at + len(targets)].astype(mx.float32))
        invalid = mx.any(mx.isnan(logprobs), axis=-1)
        wanted = mx.take_along_axis(logprobs, mx.array(targets)[:, None], axis=-1)
        best, best_values = _best(logprobs, top)
        mx.eval(invalid, wanted, best, best_values)
        _require_valid(invalid, start + first)
        own += chain.from_iterable(_rows(wanted))
        for ids, numbers in zip(_rows(best), _rows(best_values), strict=True):
            ordered = sorted(zip(ids, numbers, strict=True), key=lambda pair: (-pair[1], pair[0]))
            tokens += (token for token, _ in ordered)
            values += (value for _, value in ordered)
    return PromptLogprobs(start, tuple(own), tuple(tokens), tuple(values))


def _slices(targets: tuple[int, ...], vocabulary: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the targets in pieces whose logits fit into ``SCORED_SLICE_LOGITS``, each with its first index."""
    size = max(SCORED_SLICE_LOGITS // vocabulary, 1)
    return ((first, targets[first : first + size]) for first in range(0, len(targets), size))


def _log_softmax(logits: mx.array) -> mx.array:
    """Return the log-softmax of each row. Rows are shifted by their maximum first, so that the sum keeps its bits."""
    shifted = logits - mx.max(logits, axis=-1, keepdims=True)
    return shifted - mx.logsumexp(shifted, axis=-1, keepdims=True)


def _require_valid(invalid: mx.array, start: int) -> None:
    flags: Any = invalid.tolist()
    if any(flags):
        raise StageFailed(f"the model's output at position {start + flags.index(True)} is not finite")


def _best(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return the ids and values of the ``count`` most probable tokens of each row, in any order."""
    if count == 0:
        return mx.zeros((logprobs.shape[0], 0), mx.uint32), mx.zeros((logprobs.shape[0], 0))
    ids = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[:, :count]
    return ids, mx.take_along_axis(logprobs, ids, axis=-1)


def _rows(array: mx.array) -> list[list[Any]]:
    rows: Any = array.tolist()
    return list(rows)
