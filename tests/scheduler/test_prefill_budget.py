"""The size of a chunk: learned from frames of every length, so that it stays near the budget."""

from __future__ import annotations

from cluster.core.frames import Compute, StageTiming
from cluster.scheduler.prefill_budget import PrefillBudget
from scheduler.stages import capacity

BUDGET_MS = 100.0
IDEAL = 500
"""Tokens that take the budget: 25 ms for reading the weights, 0.15 ms a token."""


def learn(pacing: PrefillBudget, *lengths: int) -> None:
    for tokens in lengths:
        pacing.learn(Compute.PREFILL, tokens, (StageTiming(0, 0, 25_000 + 150 * tokens, 0), StageTiming(1, 0, 9, 0)))


def chunk(pacing: PrefillBudget) -> int:
    return pacing.chunk(0, 0, 100_000, others_decode=True)


def test_short_prompts_do_not_shrink_long_chunks() -> None:
    pacing = PrefillBudget(capacity(chunk=2048, max_step_ms=BUDGET_MS))
    learn(pacing, 512, 512, 512)
    before = chunk(pacing)
    learn(pacing, *[10] * 8)
    assert IDEAL * 0.75 < before < IDEAL * 1.05
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.05


def test_chunks_come_back_from_short_prompts_alone() -> None:
    """A long prompt after an hour of short ones: the second chunk separates a frame's cost from a token's."""
    pacing = PrefillBudget(capacity(chunk=2048, max_step_ms=BUDGET_MS))
    learn(pacing, *[10] * 500)
    for _ in range(4):
        learn(pacing, chunk(pacing), 10)
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.05


def test_chunks_of_one_length_settle_at_the_budget() -> None:
    pacing = PrefillBudget(capacity(chunk=2048, max_step_ms=BUDGET_MS))
    for _ in range(60):
        learn(pacing, chunk(pacing))
    assert IDEAL * 0.9 < chunk(pacing) < IDEAL * 1.1


def test_a_chunk_takes_a_stage_no_longer_than_a_decode_step_takes_them_all() -> None:
    pacing = PrefillBudget(capacity(chunk=2048, max_step_ms=BUDGET_MS))
    learn(pacing, 512, 64, 512, 64)
    for _ in range(20):
        pacing.learn(Compute.DECODE, 0, (StageTiming(0, 0, 30_000, 0), StageTiming(1, 0, 30_000, 0)))
    assert chunk(pacing) == (60 - 25) / 0.15 // 1
    for _ in range(20):
        pacing.learn(Compute.DECODE, 0, (StageTiming(0, 0, 9_000, 0), StageTiming(1, 0, 1_000, 0)))
    assert chunk(pacing) == 25 / 0.15 // 1, "half of a chunk's time is work at least"


def test_where_tokens_are_dear_a_chunk_of_one_keeps_the_budget() -> None:
    pacing = PrefillBudget(capacity(chunk=512, max_step_ms=20.0))
    for tokens in (32, 8, 16, 4, 2, 2, 1):
        pacing.learn(Compute.PREFILL, tokens, (StageTiming(0, 0, 2_000 + 7_000 * tokens, 0),))
    assert chunk(pacing) == 2
    for tokens in (8, 2) * 500:
        pacing.learn(Compute.PREFILL, tokens, (StageTiming(0, 0, 2_000 + 30_000 * tokens, 0),))
    assert chunk(pacing) == 1


def test_where_a_frame_is_dear_a_few_tokens_go_along() -> None:
    pacing = PrefillBudget(capacity(chunk=512, max_step_ms=20.0))
    learn(pacing, *[10, 60] * 20)
    assert chunk(pacing) == 4, "25 ms for reading the weights is above the budget whatever the chunk is"


def test_lengths_a_token_apart_are_cut_alike() -> None:
    pacing = PrefillBudget(capacity(chunk=512, max_step_ms=None))
    assert [pacing.chunk(0, 0, length, others_decode=False) for length in (1999, 2047, 2048)] == [256, 256, 256]
    assert pacing.chunk(0, 0, 2049, others_decode=False) == 320
