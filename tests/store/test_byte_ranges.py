"""Byte ranges, compared with a plain set of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.store.byte_ranges import ByteRanges

PIECES = st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 12))


@given(st.lists(PIECES, max_size=20), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_extents_are_a_set_of_bytes(pieces: list[tuple[bool, int, int]], start: int, end: int) -> None:
    extents, there = ByteRanges(), set[int]()
    for adds, at, length in pieces:
        (extents.add if adds else extents.remove)(at, at + length)
        there = there | set(range(at, at + length)) if adds else there - set(range(at, at + length))
    gaps = extents.gaps(start, end)
    assert [b for a, e in gaps for b in range(a, e)] == [b for b in range(start, end) if b not in there]
    assert all(e < a for (_, e), (a, _) in pairwise(gaps))
