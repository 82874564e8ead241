"""Splitting of a prompt: few lengths, no tiny last piece, and enough pieces for stages to overlap."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.core.plan import chunks


@given(st.integers(1, 20_000), st.integers(1, 16))
def test_all_of_it_goes_out_in_equal_blocks_with_nothing_tiny_at_the_end(prompt: int, stages: int) -> None:
    pieces = chunks(prompt, stages)
    assert sum(pieces) == prompt
    assert all(a == b and a % 64 == 0 for a, b in pairwise(pieces[:-1]))
    assert max(pieces) <= 512
    assert len(pieces) == 1 or pieces[-1] >= 64 or pieces[0] == 512, "a full chunk takes no more"


@given(st.integers(512, 20_000), st.integers(2, 16))
def test_every_stage_has_work_for_most_of_the_time(prompt: int, stages: int) -> None:
    pieces = chunks(prompt, stages)
    assert pieces[0] == 128 or pieces[0] <= prompt / (4 * stages) + 64, "no longer than it must be"


def test_examples() -> None:
    assert chunks(2047, 2) == [256] * 7 + [255]
    assert chunks(2049, 2) == [320] * 6 + [129]
    assert chunks(1537, 2) == [256] * 5 + [257], "a token alone would read all weights"
    assert chunks(100, 2) == [100]
    assert chunks(1030, 1) == [512, 512, 6]
