"""The text of an answer: stop strings across token borders, and no text held back needlessly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.coordinator.answer_text import TextStream


class Pieces:
    """A decoder whose tokens are indexes into a list of texts."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def add(self, token: int) -> str:
        return self._pieces[token]

    def flush(self) -> str:
        return ""


def streamed(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    text = TextStream(Pieces(pieces), stop)
    out = []
    for token in range(len(pieces)):
        out.append(text.add(token))
        if text.stopped:
            break
    out.append(text.flush())
    return out, text.stopped


alphabet = st.text("ab\n", min_size=1, max_size=3)


@given(st.lists(st.text("ab\n", max_size=3), max_size=12), st.lists(alphabet, max_size=3).map(tuple))
def test_text_is_what_comes_before_the_first_stop_string(pieces: list[str], stop: tuple[str, ...]) -> None:
    out, stopped = streamed(pieces, stop)
    whole = "".join(pieces)
    # What one look at the growing text would find: the stop string that is complete first, at its leftmost place.
    expected, found = whole, False
    for end in range(len(pieces) + 1):
        seen = "".join(pieces[:end])
        starts = [i for i in (seen.find(s) for s in stop) if i >= 0]
        if starts:
            expected, found = seen[: min(starts)], True
            break
    assert "".join(out) == expected
    assert stopped is found


def test_a_stop_string_over_three_tokens_never_shows() -> None:
    assert streamed(["yes EN", "D", "ING no"], ("ENDING",)) == (["yes ", "", "", ""], True)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    assert streamed(["one ", "two"], ("STOP",)) == (["one ", "two", ""], False)
