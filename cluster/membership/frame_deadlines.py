"""Patience: how long a frame may take before the ring counts as stuck, from how long frames took.

A stopped machine is seen by its silence; this is for one that answers pings while its GPU hangs. It learns two things
from frames that come back: seconds between one and the next while the ring is busy, and seconds a prefill token. What
it grants is many times what is usual, and never less than a floor: slow is not dead.
"""

from __future__ import annotations

from cluster.core.limits import FRAME_FLOOR_S, FRAME_SLACK, FRAME_TIMEOUT_S, MAX_PATIENCE

_STEADY_FRAMES = 256
"""After so many frames in time, those that were overdue are forgotten."""
_FORGETS = 0.98
"""A slow step counts less with every later frame: a thousand frames after one stall, patience is what it was."""


class FrameDeadlines:
    """Fed with every frame that comes back. Times are seconds of the injected clock, from ``now`` on.

    ``alive_at`` is when the ring last gave a sign of life, or began. ``overdue`` is how often a ring was given up of
    late because a frame was: each time doubles what the next one is granted.
    """

    def __init__(
        self, now: float, floor_s: float = FRAME_FLOOR_S, most_s: float = FRAME_TIMEOUT_S, overdue: int = 0
    ) -> None:
        self.alive_at, self.overdue = now, overdue
        self._steady = 0
        self._floor_s, self._most_s = floor_s, most_s
        self._step_s: float | None = None
        self._token_s = 0.0

    def learn(self, tokens: int, sent_at: float, now: float) -> None:
        """A frame came back that prefilled ``tokens``; 0 for a decode step.

        It took from the one before it, or from when it was sent into an empty ring.
        """
        took_s, self.alive_at = now - max(sent_at, self.alive_at), now
        self._steady += 1
        if self._steady >= _STEADY_FRAMES:
            self.overdue = 0
        if tokens:
            self._token_s = max(self._token_s * _FORGETS, took_s / tokens)
        step = 0.0 if tokens else took_s
        self._step_s = step if self._step_s is None else max(self._step_s * _FORGETS, step)

    def due_at(self, sent_at: float, tokens: int, more_s: float = 0.0) -> float:
        """When the oldest frame in the ring, which prefills ``tokens``, has to be back.

        It gets ``more_s`` on overloaded machines.
        """
        return max(sent_at, self.alive_at) + self.allowed_seconds(tokens) * self.growth + more_s

    @property
    def growth(self) -> float:
        """By what experience multiplies deadlines."""
        return min(MAX_PATIENCE, 2.0**self.overdue)

    def allowed_seconds(self, tokens: int) -> float:
        """Seconds from the ring's last sign of life in which a frame that prefills ``tokens`` has to come back, unless
        frames were overdue of late.

        Before anything came back kernels are compiled and nothing can be predicted: then it is the most there is.
        """
        if self._step_s is None or (tokens and not self._token_s):
            return self._most_s
        return min(self._most_s, max(self._floor_s, FRAME_SLACK * (self._step_s + tokens * self._token_s)))
