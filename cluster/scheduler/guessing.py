"""What may come next in an answer, guessed before it is computed. A wrong guess costs compute and changes no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.core.request import Request


class GuessSource(StrEnum):
    """Where a guess comes from."""

    NGRAM = "ngram"
    PREDICTION = "prediction"
    GRAMMAR = "grammar"
    DRAFT = "draft"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that are guessed to come next, in order."""

    tokens: tuple[int, ...]
    source: GuessSource


class Guesser(Protocol):
    """Guesses the tokens of answers."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        """Guess at most ``count`` tokens after ``tokens``: the prompt, the verified answer and guesses in flight."""

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """Take note of the only ``tokens`` that the request's grammar allows from ``position`` on."""

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        """Account for guesses of one source that were verified."""

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """Take note of an answer that ended: ``tokens`` are the prompt and the verified answer."""

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that left."""

    def forget_client(self, client: str) -> None:
        """Drop what was observed of a client's answers."""


class FirstGuesser:
    """Several guessers: of those that guess at all, the first one's guess counts."""

    def __init__(self, guessers: Sequence[Guesser]) -> None:
        self._guessers = guessers

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        """Return the first guess, or None."""
        guesses = (guesser.propose(request, tokens, count) for guesser in self._guessers)
        return next((guess for guess in guesses if guess), None)

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """Tell every guesser what the grammar forces."""
        for guesser in self._guessers:
            guesser.hint(request, position, tokens)

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        """Tell every guesser how guesses of a source were verified."""
        for guesser in self._guessers:
            guesser.learn(request, source, right, wrong)

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """Show every guesser an answer."""
        for guesser in self._guessers:
            guesser.observe(request, tokens)

    def forget(self, request: Request) -> None:
        """Let every guesser drop a request."""
        for guesser in self._guessers:
            guesser.forget(request)

    def forget_client(self, client: str) -> None:
        """Let every guesser drop a client's answers."""
        for guesser in self._guessers:
            guesser.forget_client(client)
