"""Into which pieces a prompt is cut, so that stages overlap. What the scheduler does and what a plan predicts agree."""

from __future__ import annotations

from typing import Final

from cluster.limits import PREFILL_CHUNK

__all__ = ["overlapping_chunk"]

_FILLS: Final = 4
"""A prompt goes out in so many chunks a stage: filling and draining the pipeline costs 1 / _FILLS of its time then."""
_LEAST_SPLIT: Final = 128
"""A shorter chunk would lose more to thin matrices than overlap wins."""


def overlapping_chunk(prompt: int, stages: int, most: int = PREFILL_CHUNK) -> int:
    """Tokens a chunk of a prompt of so many tokens, over so many stages; at most ``most``.

    Rounded up: what is left over would be a chunk of its own, which reads all weights for a few tokens.
    """
    if stages == 1:
        return most
    return min(most, max(_LEAST_SPLIT, -(-prompt // (_FILLS * stages))))
