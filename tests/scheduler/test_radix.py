"""The radix tree against a plain list: the longest common prefix, after any insertions and removals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.radix import RadixTree

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
steps = st.lists(st.tuples(st.booleans(), tokens), max_size=25)


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(steps, tokens)
def test_it_finds_what_a_search_of_everything_finds(
    history: list[tuple[bool, tuple[int, ...]]], asked: tuple[int, ...]
) -> None:
    tree, kept = RadixTree(), {}
    for entry, (add, stored) in enumerate(history):
        if add:
            replaced = tree.insert(stored, entry)
            assert replaced == next((e for e, t in kept.items() if t == stored), None)
            kept.pop(replaced, None)
            kept[entry] = stored
        elif kept:
            gone = min(kept, key=lambda e: common(kept[e], stored))
            tree.remove(gone)
            del kept[gone]
    assert len(tree) == len(kept)
    best = max((common(t, asked) for t in kept.values()), default=0)
    match = tree.longest(asked)
    assert (match.length if match else 0) == best
    if match:
        assert common(kept[match.entry], asked) == best
        assert match.whole == (len(kept[match.entry]) == best)
    whole = max((len(t) for t in kept.values() if asked[: len(t)] == t), default=0)
    found = tree.longest_whole(asked)
    assert (found.length if found else 0) == whole
    for stored in kept.values():
        begins = {e for e, t in kept.items() if t != stored and stored[: len(t)] == t}
        assert set(tree.beginnings(stored)) == begins
