"""What a worker can do and what a plan promises: the nouns of speed. Like ``cluster.types``, without behaviour.

It knows the standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Objective(StrEnum):
    """What a plan is best at: one user's next token, or many users' tokens together."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a worker's engine was measured to do, in bytes, seconds and operations; ``bandwidth`` 0: not measured.

    A decode step of one row takes ``step_s``, ``layer_s`` a layer, and its weights' and caches' bytes at
    ``bandwidth``; each further row adds ``row_cost`` (0 to 1) of the weights' time. ``flops`` is the rate of prompts.
    ``corrections`` are (model fingerprint, measured over predicted), the last learned last.
    """

    bandwidth: float = 0.0
    layer_s: float = 0.0
    step_s: float = 0.0
    flops: float = 0.0
    row_cost: float = 0.0
    corrections: tuple[tuple[str, float], ...] = ()

    @property
    def known(self) -> bool:
        return self.bandwidth > 0

    def correction(self, fingerprint: str) -> float:
        """By what its predictions are multiplied: as learned with that model, else the median over all models."""
        learned = dict(self.corrections)
        if fingerprint in learned:
            return learned[fingerprint]
        ratios = sorted(learned.values())
        return (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2 if ratios else 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two workers, as measured: seconds there and back, and bytes a second."""

    round_trip_s: float
    bandwidth: float

    def hop_s(self, nbytes: float) -> float:
        """Seconds until a message has arrived."""
        return self.round_trip_s / 2 + nbytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Spare:
    """A worker that a plan leaves out, and why."""

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan is predicted to do: tokens a second for one and for eight users, seconds to the first one of a prompt
    of ``prompt_tokens``, which are as many as the context has room for, up to 2,048.
    """

    one_user: float
    eight_users: float
    first_token_s: float
    prompt_tokens: int
