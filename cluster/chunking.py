"""Into which pieces a prompt is cut, so that stages overlap. What the scheduler does and what a plan predicts agree."""

from __future__ import annotations

from typing import Final

from cluster.limits import PREFILL_CHUNK

__all__ = ["chunks", "next_chunk", "overlapping_chunk"]

_FILLS: Final = 4
"""A prompt goes out in so many chunks a stage: filling and draining the pipeline costs 1 / _FILLS of its time then."""
_LEAST_SPLIT: Final = 128
"""A shorter chunk would lose more to thin matrices than overlap wins."""
_BLOCK: Final = 64
"""Attention over whole blocks is what GPUs' kernels are fastest at, and there are few such lengths."""


def overlapping_chunk(prompt: int, stages: int, most: int = PREFILL_CHUNK) -> int:
    """Tokens a chunk of a prompt of so many tokens, over so many stages; at most ``most``.

    Whole blocks, so that what a GPU makes for the lengths of one prompt serves the next.
    """
    if stages == 1:
        return most
    return min(most, max(_LEAST_SPLIT, -(-prompt // (_FILLS * stages * _BLOCK)) * _BLOCK))


def next_chunk(left: int, chunk: int, most: int = PREFILL_CHUNK) -> int:
    """How many of the ``left`` tokens of a prompt go out next, in chunks of ``chunk``, at most ``most``.

    The last chunk takes what would be less than a block by itself, which would read all weights for a few tokens, where
    it has room for that.
    """
    return left if left <= most and left - chunk < _BLOCK else chunk


def chunks(prompt: int, stages: int, most: int = PREFILL_CHUNK) -> list[int]:
    """Tokens of each piece of a prompt that has the stages to itself, in order."""
    chunk, pieces, left = overlapping_chunk(prompt, stages, most), list[int](), prompt
    while left:
        pieces.append(next_chunk(left, chunk, most))
        left -= pieces[-1]
    return pieces
