"""The radix tree against a plain list: the longest common prefix, after any insertions and removals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.radix import RadixTree, shared_length

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
steps = st.lists(st.tuples(st.booleans(), tokens), max_size=25)
marked = st.lists(st.frozensets(st.integers(1, 8), max_size=3), min_size=25, max_size=25)


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(steps, tokens, marked)
def test_it_finds_what_a_search_of_everything_finds(
    history: list[tuple[bool, tuple[int, ...]]], asked: tuple[int, ...], marks: list[frozenset[int]]
) -> None:
    tree, kept = RadixTree(), {}
    for entry, (add, stored) in enumerate(history):
        if add:
            replaced = tree.insert(stored, entry, [n for n in marks[entry] if n <= len(stored)])
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
    starts = {(t[:n], e) for e, t in kept.items() for n in (len(t), *(m for m in marks[e] if m <= len(t)))}
    found = tree.longest_marked(asked)
    longest = max((len(t) for t, _ in starts if asked[: len(t)] == t), default=0)
    assert (found.length if found else 0) == longest
    if found:
        assert (asked[:longest], found.entry) in starts
    for stored in kept.values():
        begins = {e for e, t in kept.items() if t != stored and stored[: len(t)] == t}
        assert set(tree.beginnings(stored)) == begins


@given(st.lists(st.integers(0, 1), max_size=600), st.integers(0, 600), st.integers(0, 3))
def test_the_shared_length_is_where_two_part(begin: list[int], at: int, more: int) -> None:
    assert shared_length(begin, [*begin, *[7] * more]) == len(begin)
    other = [*begin[:at], 9, *begin[at:]]
    assert shared_length(other, begin) == common(tuple(other), tuple(begin))


def test_an_empty_tree_keeps_no_nodes() -> None:
    tree = RadixTree()
    tree.insert((1, 2, 3, 4), 1, (2, 3))
    tree.insert((1, 2, 9), 2, (2,))
    tree.remove(1)
    assert tree.longest_marked((1, 2, 5)) is not None
    tree.remove(2)
    assert tree.longest((1,)) is None
