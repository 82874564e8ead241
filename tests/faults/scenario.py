"""Derive requests and faults from a seed. Pure, so that a seed can be replayed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """A fault of a stage, or of the link that leads to it."""

    KILL_ENGINE = "kill engine"
    CRASH_ENGINE = "crash engine"
    ABORT_ENGINE = "abort engine"
    KILL_WORKER = "kill worker"
    STOP_ENGINE = "stop engine"
    STOP_WORKER = "stop worker"
    CUT = "cut"
    CUT_ONE_WAY = "cut one way"
    RESET = "reset"
    DELAY = "delay"
    THROTTLE = "throttle"
    CORRUPT = "corrupt"
    LEAVE_WORKER = "leave worker"
    LEAVE_SPARE = "leave spare"
    DRAIN_WORKER = "drain worker"


HARMLESS = frozenset({Kind.DELAY, Kind.THROTTLE})
"""Slow is not dead: these must cause no recovery."""
ORDERLY = frozenset({Kind.LEAVE_WORKER, Kind.LEAVE_SPARE, Kind.DRAIN_WORKER})
"""Workers that leave in good order, told to stop (SIGTERM) or drained: their layers move first, without a recovery."""
LINK = frozenset({Kind.CUT, Kind.CUT_ONE_WAY, Kind.RESET, Kind.DELAY, Kind.THROTTLE, Kind.CORRUPT})
"""What happens to links goes through proxies, which a worker does not announce."""
ORDERLY_SHARE = 0.25
WEIGHTS = {
    Kind.KILL_ENGINE: 4,
    Kind.CRASH_ENGINE: 2,
    Kind.ABORT_ENGINE: 1,
    Kind.KILL_WORKER: 3,
    Kind.STOP_ENGINE: 1,
    Kind.STOP_WORKER: 2,
    Kind.CUT: 2,
    Kind.CUT_ONE_WAY: 2,
    Kind.RESET: 3,
    Kind.DELAY: 1,
    Kind.THROTTLE: 1,
    Kind.CORRUPT: 3,
}


class Moment(StrEnum):
    """When it goes wrong."""

    TOKEN = "at a token"
    PREFILL = "during prefill"
    RECOVERY = "during the recovery from another loss"


@dataclass(frozen=True)
class Asked:
    """One request of the pool: its prompt, length and sampling, and the model that it names; "" for none."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: tuple[tuple[str, Any], ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Fault:
    kind: Kind
    stage: int
    moment: Moment
    token: int
    """Of the first request, for ``Moment.TOKEN``."""
    data: bool
    """Whether a link's fault is that of the data plane to the stage before, or of the coordinator with this worker."""


@dataclass(frozen=True)
class Scenario:
    """``requests`` are places in the pool; ``starts`` the seconds after which each is sent."""

    seed: int
    requests: tuple[int, ...]
    starts: tuple[float, ...]
    faults: tuple[Fault, ...]
    announced: bool = False
    """Whether the coordinator finds its workers by their announcements, or by peers that it was given."""


def pool(vocabulary: int) -> tuple[Asked, ...]:
    """Return the possible requests: short and long prompts, greedy and seeded."""
    rng = random.Random(20)
    asked = []
    for i in range(16):
        length = rng.choice((3, 12, 40, 200))
        prompt = tuple(rng.randrange(1, vocabulary) for _ in range(length))
        sampling: tuple[tuple[str, Any], ...] = ()
        if i % 2:
            sampling = (("temperature", 0.8), ("top_p", 0.95), ("seed", i))
        if i % 5 == 4:
            sampling = (*sampling, ("repetition_penalty", 1.2), ("frequency_penalty", 0.5))
        asked.append(Asked(prompt, rng.choice((10, 30, 60)), sampling))
    return tuple(asked)


TOKENS = 50
KILLS = 2 * 3 * TOKENS


def kill(number: int, asked: tuple[Asked, ...], stages: int = 3) -> Scenario:
    """Of ``KILLS`` scenarios: SIGKILL of each stage at each of 50 tokens, with one stream and with eight as long as it.

    At even tokens an engine is killed, at odd ones the whole worker.
    """
    at, stage, streams = number % TOKENS, number // TOKENS % stages, (1, 8)[number // (TOKENS * stages) % 2]
    longest = [i for i, a in enumerate(asked) if a.max_tokens > TOKENS]
    requests = tuple(longest[(number + i) % len(longest)] for i in range(streams))
    kind = Kind.KILL_WORKER if at % 2 else Kind.KILL_ENGINE
    return Scenario(number, requests, (0.0,) * streams, (Fault(kind, stage, Moment.TOKEN, at, True),))


def scenario(seed: int, asked: tuple[Asked, ...], stages: int = 3) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(seed)
    count = rng.choice((1, 1, 2, 4, 8))
    requests = tuple(rng.randrange(len(asked)) for _ in range(count))
    starts = tuple(0.0 if i == 0 else round(rng.uniform(0, 0.2), 3) for i in range(count))
    first = _fault(rng, rng.choice((Moment.TOKEN,) * 4 + (Moment.PREFILL,)), asked[requests[0]], stages)
    faults = [first]
    if first.kind not in HARMLESS and rng.random() < 0.2:
        faults.append(_fault(rng, Moment.RECOVERY, asked[requests[0]], stages))
    return _with_departures(Scenario(seed, requests, starts, tuple(faults)))


def _with_departures(drawn: Scenario) -> Scenario:
    """Let some seeds announce their workers, and some of the workers leave in good order.

    What else a seed draws stays what it was before there were departures.
    """
    rng = random.Random(f"departures {drawn.seed}")
    announced, faults = rng.random() < 0.5, list(drawn.faults)
    orderly = sorted(ORDERLY)
    process = sorted(WEIGHTS.keys() - LINK)
    if rng.random() < ORDERLY_SHARE:
        faults[0] = replace(faults[0], kind=rng.choice(orderly))
    if announced:
        faults = [replace(f, kind=rng.choice(process + orderly)) if f.kind in LINK else f for f in faults]
    return replace(drawn, faults=tuple(faults), announced=announced)


def _fault(rng: random.Random, moment: Moment, first: Asked, stages: int) -> Fault:
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return Fault(kind, rng.randrange(stages), moment, rng.randrange(first.max_tokens), rng.random() < 0.7)
