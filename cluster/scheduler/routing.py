"""Chooses which replica of a model answers a request.

The one that keeps the longest beginning of its prompt is chosen, unless another one is predicted to be done sooner
although it has to read more. So a conversation stays where it began, until that replica is much busier. Nothing here
knows rings or threads: each replica's scheduler makes an ``Offer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from cluster.scheduler.prefixes import MIN_HIT

_NEAR: Final = 1.1
"""Predictions that differ by less than this factor are equal: measured costs vary as much."""
_NEAR_S: Final = 1e-3
_ALIKE: Final = 1.5
"""Replicas whose measured costs differ by less than this factor count as equally fast, as equal Macs are."""
_FEW_TOKENS: Final = 256.0
"""A replica that has measured fewer tokens read than this counts more like the others than like itself."""
_FEW_STEPS: Final = 10.0
"""The same for steps of decoding."""


class LinearCost(NamedTuple):
    """A cost as it was measured: ``fixed_us`` microseconds and ``unit_us`` for each unit. ``weight``: by how much."""

    fixed_us: float = 0.0
    unit_us: float = 0.0
    weight: float = 0.0

    def us(self, units: float) -> float:
        """Return the microseconds of so many units."""
        return self.fixed_us + self.unit_us * units


UNMEASURED: Final = LinearCost()


@dataclass(frozen=True, slots=True)
class Offer:
    """What a replica can do for a request now.

    ``kept``: the tokens of its prompt that need not be read. ``unread``: the tokens to read before its first token,
    those of other prompts that come first included; at least 1. ``steps``: how many steps of decoding its answer will
    wait for, each of ``rows`` sequences. ``live``: live samples. ``filled``: how full the memory for prefixes is, from
    0 to 1. ``read`` is the cost of tokens, by the weight of tokens; ``step`` that of rows, by the weight of steps.

    ``fits``: whether its memory can ever hold the request. ``has_room``: whether its queue can. ``is_live``: whether
    a request with its id is live there, which then refuses the request.
    """

    kept: int
    unread: int
    live: int
    rows: float = 1.0
    steps: float = 1.0
    read: LinearCost = UNMEASURED
    step: LinearCost = UNMEASURED
    filled: float = 0.0
    fits: bool = True
    has_room: bool = True
    is_live: bool = False


def choose_replica(offers: Sequence[Offer]) -> int:
    """Return the index of the offer to take, of at least one."""
    indices = range(len(offers))
    if live := [i for i in indices if offers[i].is_live]:
        return live[0]
    fitting = [i for i in indices if offers[i].fits] or list(indices)
    candidates = [i for i in fitting if offers[i].has_room] or fitting
    seconds = dict(zip(candidates, predict_s([offers[i] for i in candidates]), strict=True))
    soonest = min(seconds.values())
    near = [i for i in candidates if seconds[i] <= soonest * _NEAR + _NEAR_S]
    return min(near, key=lambda i: (-_useful(offers[i].kept), offers[i].live, offers[i].filled, i))


def predict_s(offers: Sequence[Offer]) -> list[float]:
    """Return the predicted seconds until each replica would be done with the request.

    What a replica has hardly measured counts as for the others: they run the same model. If none has measured anything,
    a token to read and a live sample count as one second each, so that the least loaded replica is soonest.
    """
    if not any(offer.read.weight for offer in offers):
        return [float(offer.unread + offer.live) for offer in offers]
    reads = _even_out(_blend([offer.read for offer in offers], _FEW_TOKENS), _FEW_TOKENS)
    steps = _even_out(_blend([offer.step for offer in offers], _FEW_STEPS), 1.0)
    return [
        (read.us(offer.unread) + offer.steps * step.us(offer.rows)) / 1e6
        for offer, read, step in zip(offers, reads, steps, strict=True)
    ]


def _blend(costs: Sequence[LinearCost], few: float) -> list[LinearCost]:
    """Return each cost as a mean of it and of all, in which all together have the weight ``few``."""
    total = sum(cost.weight for cost in costs)
    if not total:
        return [UNMEASURED] * len(costs)
    fixed = sum(cost.fixed_us * cost.weight for cost in costs) / total
    unit = sum(cost.unit_us * cost.weight for cost in costs) / total
    return [
        LinearCost(
            (cost.fixed_us * cost.weight + fixed * few) / (cost.weight + few),
            (cost.unit_us * cost.weight + unit * few) / (cost.weight + few),
        )
        for cost in costs
    ]


def _even_out(costs: Sequence[LinearCost], units: float) -> Sequence[LinearCost]:
    """Return the mean for all if no cost of so many units is much higher than another, else each as it is."""
    spent = [cost.us(units) for cost in costs]
    if max(spent) > min(spent) * _ALIKE:
        return costs
    fixed, unit = (sum(parts) / len(costs) for parts in zip(*((c.fixed_us, c.unit_us) for c in costs), strict=True))
    return [LinearCost(fixed, unit)] * len(costs)


def _useful(kept: int) -> int:
    return kept if kept >= MIN_HIT else 0
