"""Derive requests, and faults of coordinators, workers and pairs of them, from a seed. Pure, so that a seed replays."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

VOCABULARY = 700
TOKENS = 100
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}'


class Target(StrEnum):
    """What is hit."""

    LEADER = "leader"
    STANDBY = "standby"
    WORKER = "worker"


PAIRS = (
    (Target.LEADER, Target.STANDBY),
    (Target.LEADER, Target.WORKER),
    (Target.STANDBY, Target.WORKER),
    (Target.WORKER, Target.WORKER),
)
"""Which two are hit; of two workers, different ones."""


class Blow(StrEnum):
    """How: a process ends at once, or stops for a while; all processes of its Mac do; or its Mac's cable is pulled."""

    KILL = "kill"
    STOP = "stop"
    CRASH = "crash"
    SLEEP = "sleep"
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


class Course(StrEnum):
    """How the strikes of a scenario belong together.

    ``RESTART`` kills two processes at once, which both start again with their disks. ``PAIR`` strikes twice in any way,
    and both come back. Of ``LOST_PAIR`` neither comes back before the answers have ended.
    """

    SINGLE = "single"
    RESTART = "restart"
    PAIR = "pair"
    LOST_PAIR = "lost pair"


@dataclass(frozen=True)
class CoordinatorScenario:
    """``requests`` are places in the pool; the strikes begin when the first one has ``token`` tokens."""

    seed: int
    requests: tuple[int, ...]
    token: int
    course: Course
    strikes: tuple[Strike, ...]

    @property
    def keeps_all(self) -> bool:
        """Whether no answer may be lost: one fault alone, or two whose processes come back with their disks."""
        return self.course is not Course.LOST_PAIR

    @property
    def kind(self) -> str:
        """The kind of fault, by which the times of recovery are reported."""
        if self.course is Course.SINGLE:
            return f"{self.strikes[0].blow} {self.strikes[0].target}"
        return f"{self.course}: {' and '.join(sorted(strike.target for strike in self.strikes))}"


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


def coordinator_scenario(seed: int, blows: Sequence[Blow] = tuple(Blow)) -> CoordinatorScenario:
    """Return the scenario of a seed, with these blows: of ten, five are single faults, four are pairs that come back
    (two of them killed at once), and one is a lost pair.
    """
    rng = random.Random(seed)
    requests = tuple(rng.randrange(16) for _ in range(rng.choice((1, 2, 4))))
    course = rng.choice((Course.SINGLE,) * 5 + (Course.RESTART, Course.PAIR) * 2 + (Course.LOST_PAIR,))
    targets = (rng.choice(tuple(Target)),) if course is Course.SINGLE else rng.choice(PAIRS)
    strikes = []
    for i, target in enumerate(targets):
        blow = Blow.KILL if course is Course.RESTART else rng.choice(blows)
        delay = 0.0 if i == 0 or course is Course.RESTART else round(rng.uniform(0.0, rng.choice((1.0, 8.0))), 2)
        back = round(rng.uniform(1.0, 8.0), 1)
        comes_back = course in (Course.RESTART, Course.PAIR) or (course is Course.SINGLE and rng.random() < 0.5)
        strikes.append(Strike(target, blow, delay, back if comes_back else None))
    return CoordinatorScenario(seed, requests, rng.randrange(TOKENS - 5), course, tuple(strikes))


def leader_kill(number: int) -> CoordinatorScenario:
    """Return a scenario in which the leader is killed at a token of one greedy or seeded answer, and comes back."""
    strike = Strike(Target.LEADER, Blow.KILL, 0.0, 8.0)
    asked = (number % 2 + 4 * (number // 2 % 4),)
    return CoordinatorScenario(number, asked, number * 7 % (TOKENS - 5), Course.SINGLE, (strike,))
