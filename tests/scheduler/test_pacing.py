"""What a chunk may carry: learned from frames of every length, so that it stays near the budget."""

from __future__ import annotations

from cluster.scheduler.pacing import Pacing
from cluster.types import StageTiming

BUDGET_MS = 100.0
IDEAL = 500
"""Tokens that take the budget: 25 ms for reading the weights, 0.15 ms a token."""


def learn(pacing: Pacing, *lengths: int) -> None:
    for tokens in lengths:
        pacing.learn(tokens, (StageTiming(0, 0, 25_000 + 150 * tokens, 0), StageTiming(1, 0, 9, 0)))


def chunk(pacing: Pacing) -> int:
    return pacing.chunk(100_000, others_decode=True)


def test_short_prompts_do_not_shrink_long_chunks() -> None:
    pacing = Pacing(2048, 2, BUDGET_MS)
    learn(pacing, 512, 512, 512)
    before = chunk(pacing)
    learn(pacing, *[10] * 8)
    assert IDEAL * 0.75 < before < IDEAL * 1.05
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.05


def test_chunks_come_back_from_short_prompts_alone() -> None:
    """A long prompt after an hour of short ones: the second chunk tells a frame's cost from a token's."""
    pacing = Pacing(2048, 2, BUDGET_MS)
    learn(pacing, *[10] * 500)
    for _ in range(4):
        learn(pacing, chunk(pacing), 10)
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.05


def test_chunks_of_one_length_settle_at_the_budget() -> None:
    pacing = Pacing(2048, 2, BUDGET_MS)
    for _ in range(60):
        learn(pacing, chunk(pacing))
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.1
