"""Shares the Macs' memory among the models that are placed on them.

Every stage gets its weights and one full context. Then all models get room for further contexts at the same pace, until
a Mac is full: the models there have as many as they can, and the others go on. It knows bytes. It refuses to know where
models are placed, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

__all__ = ["MemoryNeed", "MemoryNeeds", "MemoryShares", "least_shares", "share_memory"]


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What a model's stage needs on a Mac: the bytes of its weights, and of the caches of one full context."""

    weight_bytes: int
    context_bytes: int

    @property
    def least(self) -> int:
        """The bytes without which the stage cannot serve a single request of full length."""
        return self.weight_bytes + self.context_bytes


MemoryNeeds: TypeAlias = Mapping[str, Mapping[str, MemoryNeed]]
"""For each model, the needs of its stages by the Macs' names."""
MemoryShares: TypeAlias = dict[str, dict[str, int]]
"""For each model, the bytes that it may take for weights and caches, by the Macs' names."""


def share_memory(
    usable: Mapping[str, int], needs: MemoryNeeds, most_contexts: Mapping[str, int] | None = None
) -> MemoryShares:
    """Return how many bytes of each Mac each model may take. No Mac's shares are more than its ``usable`` bytes.

    ``most_contexts`` is how many full contexts a model has room for at most; a model that it does not name has no such
    limit. Raise ValueError if the least bytes of all stages on a Mac are more than there are.
    """
    limits = most_contexts or {}
    left = {mac: usable[mac] - sum(need.least for need in on_mac) for mac, on_mac in _by_mac(needs).items()}
    if lacking := [mac for mac, nbytes in left.items() if nbytes < 0]:
        raise ValueError(f"the stages on {lacking[0]} need {-left[lacking[0]]} bytes more than there are")
    levels = _further_contexts(left, needs, {name: most - 1 for name, most in limits.items()})
    shares = {
        name: {mac: need.least + int(levels[name] * need.context_bytes) for mac, need in stages.items()}
        for name, stages in needs.items()
    }
    _share_rest(usable, needs, shares, [name for name in needs if name not in limits])
    return shares


def least_shares(shares: MemoryShares, others: MemoryShares) -> MemoryShares:
    """Return the lesser share on each Mac of the models that both have. Those that one alone has keep their shares."""
    both = {**others, **shares}
    return {
        name: {mac: min(nbytes, others.get(name, stages).get(mac, nbytes)) for mac, nbytes in stages.items()}
        for name, stages in both.items()
    }


def _by_mac(needs: MemoryNeeds) -> dict[str, list[MemoryNeed]]:
    found: dict[str, list[MemoryNeed]] = {}
    for stages in needs.values():
        for mac, need in stages.items():
            found.setdefault(mac, []).append(need)
    return found


def _further_contexts(
    left: Mapping[str, int], needs: MemoryNeeds, limits: Mapping[str, int]
) -> dict[str, Fraction | int]:
    """Return how many contexts beyond the first each model has room for.

    All grow together. Once a Mac is full, its models stop, and so does one that has reached its limit.
    """
    done: dict[str, Fraction | int] = {}
    while growing := [name for name in needs if name not in done]:
        bounds = {name: Fraction(max(limits[name], 0)) for name in growing if name in limits}
        for mac, nbytes in left.items():
            held = sum(done[name] * needs[name][mac].context_bytes for name in done if mac in needs[name])
            pace = sum(needs[name][mac].context_bytes for name in growing if mac in needs[name])
            if pace:
                level = (nbytes - held) / Fraction(pace)
                on_mac = [name for name in growing if mac in needs[name] and needs[name][mac].context_bytes]
                bounds |= {name: min(level, bounds.get(name, level)) for name in on_mac}
        lowest = min(bounds.values(), default=Fraction(0))
        done |= {name: lowest for name in growing if bounds.get(name, lowest) == lowest}
    return done


def _share_rest(usable: Mapping[str, int], needs: MemoryNeeds, shares: MemoryShares, names: list[str]) -> None:
    """Give what is left on a Mac to those of its models that have no limit, by the size of their contexts there."""
    for mac in _by_mac(needs):
        rest = usable[mac] - sum(stages.get(mac, 0) for stages in shares.values())
        weights = {name: needs[name][mac].context_bytes for name in names if mac in needs[name]}
        total = sum(weights.values())
        for name, weight in weights.items():
            shares[name][mac] += rest * weight // total if total else rest // len(weights)
        if weights:
            first = next(iter(weights))
            shares[first][mac] += usable[mac] - sum(stages.get(mac, 0) for stages in shares.values())
