"""Where the end of a text occurred before, against a plain search of lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.suffix_lookup import SEARCHES, find_ahead, find_suffix, pack_ids, shared_end, unpack_ids

ids = st.sampled_from([0, 1, 2, 256, 65_536, 2**24, 2**32 - 1])
"""Zero bytes and single bits, so that ids occur across the borders of others too."""
texts = st.lists(ids, max_size=40)


def shared(a: list[int], b: list[int]) -> int:
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@given(texts)
def test_packed_ids_are_the_same_ids(text: list[int]) -> None:
    assert unpack_ids(pack_ids(text)) == tuple(text)


@given(texts, texts.filter(bool), st.integers(1, 5), st.integers(0, 3))
def test_a_match_is_one_and_none_is_missed(text: list[int], tail: list[int], least: int, start: int) -> None:
    match = find_suffix(pack_ids(text), pack_ids(tail), least, start, len(text))
    ends = {end for end in range(start + least, len(text) + 1) if shared(text[start:end], tail) >= least}
    if match is None:
        assert not ends
    else:
        assert match.end in ends
        assert match.length == shared(text[: match.end], tail)


@given(st.lists(st.integers(0, 2), min_size=6, max_size=30))
def test_the_longest_of_few_matches_is_found(text: list[int]) -> None:
    """Each search finds a longer one than the last, so as many as there are searches never miss the longest."""
    tail = text[-4:]
    lengths = [shared(text[:end], tail) for end in range(len(text))]
    kinds = {length for length in lengths if length}
    match = find_suffix(pack_ids(text), pack_ids(tail), 1, 0, len(text) - 1)
    if len(kinds) <= SEARCHES:
        assert (match.length if match else 0) == max(lengths)


def test_of_equal_matches_the_last_is_found() -> None:
    text = pack_ids([1, 2, 3, 1, 2, 4, 1, 2])
    match = find_suffix(text, pack_ids([1, 2]), 2, 0, 7)
    assert match
    assert (match.end, match.length) == (5, 2)


@given(texts, st.lists(ids, min_size=1, max_size=3), st.integers(0, 40))
def test_the_first_occurrence_ahead(text: list[int], pattern: list[int], start: int) -> None:
    places = [i for i in range(start, len(text)) if text[i : i + len(pattern)] == pattern]
    want = places[0] + len(pattern) if places else -1
    assert find_ahead(pack_ids(text), pack_ids(pattern), start) == want


def test_a_text_of_occurrences_between_ids_ends_the_search() -> None:
    """What only occurs across the borders of ids is not searched for ever: 1 s for 65,536 ids otherwise."""
    text = pack_ids([0x00010001] * 65_536)
    pattern = pack_ids([0x01000100] * 2)
    assert find_suffix(text, pattern, 2, 0, 65_536) is None
    assert find_ahead(text, pattern, 0) == -1


@given(texts, texts)
def test_shared_ends(text: list[int], tail: list[int]) -> None:
    for stop in range(len(text) + 1):
        assert shared_end(pack_ids(text), stop * 4, pack_ids(tail)) == shared(text[:stop], tail)
