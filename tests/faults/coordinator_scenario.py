"""Derive requests, and faults of coordinators, workers and pairs of them, from a seed. Pure, so that a seed replays."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

VOCABULARY = 700
TOKENS = 60
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}'


class Target(StrEnum):
    """What is hit."""

    LEADER = "leader"
    STANDBY = "standby"
    WORKER = "worker"


class Blow(StrEnum):
    """How: a process ends at once, it stops for a while, or its Mac's cable is pulled."""

    KILL = "kill"
    STOP = "stop"
    CUT = "cut"


class Sort(StrEnum):
    """How an answer's tokens are chosen. Only those of ``SAMPLED`` cannot be known before."""

    GREEDY = "greedy"
    SEEDED = "seeded"
    GRAMMAR = "grammar"
    SAMPLED = "sampled"


@dataclass(frozen=True)
class Question:
    """A request of the pool. ``options`` are the client's keywords."""

    sort: Sort
    prompt: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Strike:
    """A fault. ``after_s`` counts from the token at which the scenario strikes first.

    ``back_s`` later the process is started again or goes on, or the cable is plugged in; None: after the answers ended.
    """

    target: Target
    blow: Blow
    after_s: float
    back_s: float | None


@dataclass(frozen=True)
class CoordinatorScenario:
    """``requests`` are places in the pool; the strikes begin when the first one has ``token`` tokens."""

    seed: int
    requests: tuple[int, ...]
    token: int
    strikes: tuple[Strike, ...]

    @property
    def keeps_all(self) -> bool:
        """Whether no answer may be lost: one fault alone, or two whose processes come back with their disks."""
        return len(self.strikes) == 1 or all(one.back_s is not None for one in self.strikes)


def questions() -> tuple[Question, ...]:
    """Return the possible requests: four of each sort."""
    rng = random.Random(25)
    made = []
    for i in range(16):
        sort = tuple(Sort)[i % 4]
        prompt = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.choice((3, 12, 40))))
        options: dict[str, Any] = {"max_tokens": TOKENS}
        if sort is Sort.GRAMMAR:
            options |= {"json_schema": SCHEMA}
        else:
            options |= {"ignore_eos": True}
        if sort is Sort.SEEDED:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": i}
        if sort is Sort.SAMPLED:
            options |= {"temperature": 0.8}
        made.append(Question(sort, prompt, options))
    return tuple(made)


def coordinator_scenario(seed: int) -> CoordinatorScenario:
    """Return the scenario of a seed: of ten, six have one fault, three two of which all come back, one another pair."""
    rng = random.Random(seed)
    requests = tuple(rng.randrange(16) for _ in range(rng.choice((1, 2, 4))))
    kind = rng.choice(("one",) * 6 + ("pair",) * 3 + ("lost pair",))
    targets = rng.sample(tuple(Target), 1 if kind == "one" else 2)
    strikes = []
    for i, target in enumerate(targets):
        back = round(rng.uniform(1.0, 8.0), 1)
        comes_back = kind != "lost pair" and (kind == "pair" or rng.random() < 0.5)
        delay = 0.0 if i == 0 else round(rng.uniform(0.0, 2.0), 2)
        strikes.append(Strike(target, rng.choice(tuple(Blow)), delay, back if comes_back else None))
    return CoordinatorScenario(seed, requests, rng.randrange(TOKENS - 5), tuple(strikes))


def leader_kill(number: int) -> CoordinatorScenario:
    """Return a scenario in which the leader is killed at a token of one greedy or seeded answer, and comes back."""
    strike = Strike(Target.LEADER, Blow.KILL, 0.0, 8.0)
    return CoordinatorScenario(number, (number % 2 + 4 * (number // 2 % 4),), number * 7 % (TOKENS - 5), (strike,))
