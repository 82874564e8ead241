"""Chooses which replica of a model answers a request.

The one that keeps the longest beginning of its prompt is chosen, unless another one is predicted to be done sooner
although it has to read more. So a conversation stays where it began, until that replica is much busier. Nothing here
knows rings or threads: each replica's scheduler makes an ``Offer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.scheduler.prefixes import MIN_HIT

_NEAR: Final = 1.1
"""Predictions that differ by less than this factor are equal: measured costs vary as much."""
_NEAR_S: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Offer:
    """What a replica can do for a request now.

    ``kept``: the tokens of its prompt that need not be read. ``unread``: the tokens to read before its first token,
    those of other prompts that come first included; at least 1. ``read_s``: the seconds that this takes, and
    ``answer_s``: those of its answer beside the live ones; None if nothing was measured. ``live``: live samples.
    ``filled``: how full the memory for prefixes is, from 0 to 1.

    ``fits``: whether its memory can ever hold the request. ``has_room``: whether its queue can. ``is_live``: whether
    a request with its id is live there, which then refuses the request.
    """

    kept: int
    unread: int
    read_s: float | None
    answer_s: float | None
    live: int
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

    A replica that has not measured its costs counts as fast as the others. If none has, a token to read and a live
    sample count as one second each, so that the least loaded replica is soonest.
    """
    rates = [offer.read_s / offer.unread for offer in offers if offer.read_s is not None]
    answers = [offer.answer_s / (offer.live + 1) for offer in offers if offer.answer_s is not None]
    if not rates:
        return [float(offer.unread + offer.live) for offer in offers]
    rate = sum(rates) / len(rates)
    answer = sum(answers) / len(answers) if answers else 0.0
    return [
        (offer.unread * rate if offer.read_s is None else offer.read_s)
        + (answer * (offer.live + 1) if offer.answer_s is None else offer.answer_s)
        for offer in offers
    ]


def _useful(kept: int) -> int:
    return kept if kept >= MIN_HIT else 0
