"""Guessers for tests: they know the answers of the fake stages, or do not."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.core.request import Request
from cluster.scheduler.guessing import Guess, GuessSource
from scheduler.stages import next_token


class Oracle:
    """Guesses the fake stages' tokens. A share ``error`` of its tokens is wrong: 0 never errs, 1 always does.

    ``seen`` are the answers that it was shown, ``left`` the ids of the requests that left.
    """

    def __init__(self, rng: random.Random, error: float) -> None:
        self.rng, self.error = rng, error
        self.seen: dict[str, tuple[int, ...]] = {}
        self.left: list[str] = []
        self.right = self.wrong = 0

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        assert tuple(tokens[: len(request.prompt)]) == request.prompt
        assert request.id not in self.left
        found: list[int] = []
        for _ in range(self.rng.randint(1, count)):
            token = next_token((*tokens, *found))
            wrong = self.rng.random() < self.error
            found.append(token % 50 + 1 if wrong else token)
        return Guess(tuple(found), self.rng.choice((GuessSource.NGRAM, GuessSource.REPLAY)))

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """Nothing is forced here."""

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        self.right += right
        self.wrong += wrong

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        self.seen[request.id] = tuple(tokens)

    def forget(self, request: Request) -> None:
        self.left.append(request.id)

    def forget_client(self, client: str) -> None:
        self.seen.clear()


class Constant(Oracle):
    """Guesses one token, whatever comes."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        return Guess((7,) * count, GuessSource.NGRAM)


class Fickle(Oracle):
    """Guesses at random, now and then nothing."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        guess = super().propose(request, tokens, count)
        return guess if self.rng.random() < 0.5 else None
