"""Runs ``macpipe`` with a guesser for benches: it replays an answer that it has seen, with a set share of wrong tokens.

Arguments are those of ``macpipe``. A request's id says how: ``replay-0.7-...`` is guessed right with probability 0.7.
All other requests are guessed with the probability that REPLAY_RATE names, and without regard to what it costs; without
that variable they are not. With REPLAY_ROWS, frames have that many tokens where the model's caches can be trimmed,
again whatever it costs. Every answer is remembered by its prompt.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.cli.main import main
from cluster.coordinator import planner, recovery, service
from cluster.core.lap_times import LapTimes
from cluster.core.plan import Plan
from cluster.core.request import Request
from cluster.scheduler import guess_chains
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.verify_length import Depth

OF_ALL = os.environ.get("REPLAY_RATE")
ROWS = int(os.environ.get("REPLAY_ROWS", "0"))
RATE = re.compile(r"replay-([0-9.]+)-")
OTHER = 5
"""What is added to a token to make it a wrong guess."""


class ReplayGuesser:
    """Guesses answers that were given before. Whether a token's guess is right depends on the id and its position."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        named, known = RATE.match(request.id), self._answers.get(request.prompt, ())
        rate, following = named[1] if named else OF_ALL, known[len(tokens) : len(tokens) + count]
        if rate is None or not following:
            return None
        guessed = (
            token if random.Random(f"{request.id} {len(tokens) + i}").random() < float(rate) else token ^ OTHER
            for i, token in enumerate(following)
        )
        return Guess(tuple(guessed), GuessSource.REPLAY)

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """Ignore what a grammar forces."""

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        """Ignore what was right: the rate is set."""

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        self._answers[request.prompt] = tuple(tokens)

    def forget(self, request: Request) -> None:
        """Keep the answers: there are as many as prompts in a bench."""

    def forget_client(self, client: str) -> None:
        """Keep the answers: a bench has no keys."""


def _most(times: LapTimes, acceptance: float, most: int) -> int:
    """Choose the longest chain, whatever it costs."""
    return max(1, most)


def _longest(steps: Mapping[int, LapTimes], acceptance: float, most: int) -> Depth:
    """Choose the longest chain of the longest frames, whatever it costs."""
    return Depth(max(1, most), max(steps))


def _capacity_with_rows(plan: Plan, *rest: Any) -> Capacity:
    found = planner.capacity(plan, *rest)
    return found if found.mark_cost_of else replace(found, verify_costs={ROWS: (1.0,) * len(plan.stages)})


def _guessing_scheduler(epoch: int, capacity: Any, eos: frozenset[int], *_: object) -> Scheduler:
    return Scheduler(epoch, capacity, eos, ReplayGuesser())


if __name__ == "__main__":
    service.Scheduler = _guessing_scheduler  # type: ignore[assignment, misc]
    if OF_ALL:
        guess_chains.choose_window = _most
    if ROWS:
        guess_chains.choose_depth = _longest
        service.capacity = recovery.capacity = _capacity_with_rows
    main()
