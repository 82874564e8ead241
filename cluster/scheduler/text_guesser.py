"""Guesses an answer from texts: the client's prediction, the request's own tokens, and the client's earlier answers.

Where the last tokens of a sequence occurred before, what followed there is the guess, and the sequence is followed
along that text until they part. Tokens that a grammar forces go before any text. Otherwise a guess need not fit the
grammar, which only the last stage knows: it then differs from the token that is sampled, as any wrong guess does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.core.limits import LOOKUP_TOKENS
from cluster.core.request import Request
from cluster.scheduler.answer_history import BOUNDARY, AnswerHistory
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.suffix_lookup import (
    ID_BYTES,
    Packed,
    SuffixMatch,
    find_ahead,
    find_suffix,
    pack_ids,
    shared_end,
    unpack_ids,
)

LEAST_MATCH: Final = 2
"""Tokens that must have occurred before, at least. Pairs of tokens repeat by chance in most texts."""
MOST_MATCH: Final = 6
"""The same where guesses of the sequence were often wrong."""
TAIL: Final = 16
"""Tokens by which occurrences are compared."""
_IN_FLIGHT: Final = 64
"""Tokens at the end of a sequence that may have been replaced since it was last seen. No chain of guesses is longer."""


@dataclass(frozen=True, slots=True)
class _TextPosition:
    """Token ``index`` of ``text`` is the guess for position ``position`` of the sequence."""

    source: GuessSource
    text: Packed
    index: int
    position: int


class _GuessContext:
    """A sequence as packed token ids, and the text from which its next tokens are guessed."""

    def __init__(self, request: Request, tokens: Sequence[int]) -> None:
        self._first = max(len(tokens) - LOOKUP_TOKENS, 0)
        self.text = bytearray()
        self.prediction = pack_ids(request.prediction)
        self.resume = 0
        """Index in the prediction from which it is searched for the answer's last tokens."""
        self.least = LEAST_MATCH
        self.place: _TextPosition | None = None
        self.forced: tuple[int, ...] = ()
        self.forced_start = 0
        """The position of the first of the tokens that the grammar forces."""

    def update(self, tokens: Sequence[int]) -> None:
        """Take over the tokens that are new, and those that were guesses."""
        known = self._first + len(self.text) // ID_BYTES
        same = max(min(known, len(tokens)) - _IN_FLIGHT, self._first)
        del self.text[(same - self._first) * ID_BYTES :]
        self.text += pack_ids(tokens[same:])

    def tail(self, count: int) -> Packed:
        """Return the last ``count`` tokens."""
        return self.text[max(len(self.text) - count * ID_BYTES, 0) :]


class TextGuesser:
    """Guesses the tokens of all requests. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._followed: dict[str, _GuessContext] = {}
        self.answers = AnswerHistory(clock)

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        """Guess at most ``count`` tokens after ``tokens``: the prompt, the verified answer and guesses in flight."""
        followed = self._followed.get(request.id)
        if followed is None:
            followed = self._followed[request.id] = _GuessContext(request, tokens)
        if forced := _read_forced(followed, tokens):
            return Guess(forced[:count], GuessSource.GRAMMAR)
        followed.update(tokens)
        place = _go_on(followed, len(tokens)) or self._find(followed, request, len(tokens))
        followed.place = place
        if place is None:
            return None
        if place.source is GuessSource.PREDICTION:
            followed.resume = place.index
        return Guess(_read(place, count), place.source)

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """Take note of the only ``tokens`` that the request's grammar allows from ``position`` on."""
        if followed := self._followed.get(request.id):
            followed.forced, followed.forced_start = tokens, position

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        """Require longer matches after wrong guesses, shorter ones after right guesses."""
        followed = self._followed.get(request.id)
        if followed and source is GuessSource.NGRAM:
            followed.least = min(max(followed.least + wrong - right, LEAST_MATCH), MOST_MATCH)

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """Keep an answer for the client's later requests."""
        self.answers.add(request.client, tokens[len(request.prompt) :])

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that left."""
        self._followed.pop(request.id, None)

    def forget_client(self, client: str) -> None:
        """Drop the answers of a client."""
        self.answers.forget(client)

    def _find(self, followed: _GuessContext, request: Request, length: int) -> _TextPosition | None:
        """Find a text that goes on where the sequence ends."""
        answered = length - len(request.prompt)
        if followed.prediction and (index := _find_in_prediction(followed, answered)) is not None:
            return _TextPosition(GuessSource.PREDICTION, followed.prediction, index, length)
        tail, least = followed.tail(TAIL), followed.least
        known = len(followed.text) // ID_BYTES
        own = find_suffix(followed.text, tail, least, max(known - LOOKUP_TOKENS, 0), known - 1)
        earlier = self.answers.of(request.client)
        other = find_suffix(earlier, tail, least, 0, len(earlier) // ID_BYTES)
        if other and _at_boundary(earlier, other.end):
            other = None
        return _longer(own, followed.text, other, earlier, length)


def _longer(
    own: SuffixMatch | None, text: Packed, other: SuffixMatch | None, earlier: Packed, at: int
) -> _TextPosition | None:
    """Return the place after the longer of two matches; of equals, the request's own."""
    if own and (other is None or own.length >= other.length):
        return _TextPosition(GuessSource.NGRAM, text, own.end, at)
    return _TextPosition(GuessSource.NGRAM, earlier, other.end, at) if other else None


def _go_on(followed: _GuessContext, length: int) -> _TextPosition | None:
    """Return the next place in the text that was followed last, or None if the sequence has left it."""
    last = followed.place
    if last is None:
        return None
    index = last.index + length - last.position
    if index < 1 or index * ID_BYTES >= len(last.text) or _at_boundary(last.text, index):
        return None
    least = min(index, LEAST_MATCH)
    if shared_end(last.text, index * ID_BYTES, followed.tail(least)) < least:
        return None
    return _TextPosition(last.source, last.text, index, length)


def _find_in_prediction(followed: _GuessContext, answered: int) -> int | None:
    """Return the index in the prediction at which an answer of so many tokens goes on, or None."""
    if not answered:
        return 0
    for length in (4, LEAST_MATCH):
        if length <= answered:
            tail = followed.tail(length)
            index = find_ahead(followed.prediction, tail, max(followed.resume - length, 0))
            index = find_ahead(followed.prediction, tail, 0) if index < 0 else index
            if 0 <= index < len(followed.prediction) // ID_BYTES:
                return index
    return None


def _read_forced(followed: _GuessContext, tokens: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that the grammar forces after ``tokens``, as far as they are known."""
    known = len(tokens) - followed.forced_start
    if not 0 <= known < len(followed.forced) or tuple(tokens[followed.forced_start :]) != followed.forced[:known]:
        return ()
    return followed.forced[known:]


def _at_boundary(text: Packed, index: int) -> bool:
    return text[index * ID_BYTES : (index + 1) * ID_BYTES] == BOUNDARY


def _read(place: _TextPosition, count: int) -> tuple[int, ...]:
    """Return at most ``count`` tokens from a place on, up to the end of its answer."""
    tokens = unpack_ids(bytes(place.text[place.index * ID_BYTES : (place.index + count) * ID_BYTES]))
    boundary = unpack_ids(BOUNDARY)[0]
    return tokens[: tokens.index(boundary)] if boundary in tokens else tokens
