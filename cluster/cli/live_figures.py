"""Compute the rates that a live view shows from the snapshots of a cluster that it got. Pure arithmetic."""

from __future__ import annotations

from collections import deque
from typing import Final

from cluster.client import ClusterState, LiveRequest

KEPT: Final = 120
"""Rates that are kept for the curve."""
RATE_S: Final = 1.0
"""A rate is over at least this long, so that one token more or less does not show."""


class TokenRates:
    """The rates at which a cluster generated tokens, from its snapshots in order."""

    def __init__(self) -> None:
        self._snapshots: deque[tuple[float, int]] = deque(maxlen=KEPT)
        self.curve: deque[float] = deque(maxlen=KEPT)
        """Tokens per second, oldest first; one for each snapshot but the first."""

    def add(self, state: ClusterState) -> None:
        """Add the next snapshot. One of a coordinator that has restarted since begins anew."""
        now, tokens = state.uptime_seconds, state.tokens_generated
        if self._snapshots and (now <= self._snapshots[-1][0] or tokens < self._snapshots[-1][1]):
            self._snapshots.clear()
        before = [one for one in self._snapshots if one[0] <= now - RATE_S] or list(self._snapshots)[:1]
        if before:
            then, had = before[-1]
            self.curve.append((tokens - had) / (now - then))
        self._snapshots.append((now, tokens))

    @property
    def now(self) -> float | None:
        """Tokens per second at the last snapshot; None before the second one."""
        return self.curve[-1] if self.curve else None


def hit_share(state: ClusterState) -> float | None:
    """Return the share of prompt tokens that came from kept prefixes; None before the first prompt."""
    return state.cached_tokens / state.prompt_tokens if state.prompt_tokens else None


def time_shares(request: LiveRequest) -> list[tuple[str, float]]:
    """Return where a request's time went: the share of each stage's compute, then of waiting and of the wire.

    The list is empty before its first frame has come back.
    """
    parts = [(stage.worker, stage.compute_ms) for stage in request.stages]
    parts.append(("wait", sum(stage.wait_ms for stage in request.stages)))
    parts.append(("wire", sum(stage.wire_ms for stage in request.stages)))
    whole = sum(ms for _, ms in parts)
    return [(name, ms / whole) for name, ms in parts] if whole else []
