"""Learns how long a frame may take before the ring counts as stuck.

Silence reveals a stopped machine. Frame deadlines detect a machine that answers pings while its GPU hangs. They are
learned from the frames that come back: the seconds between frames while the ring is busy, and the seconds per prefill
token. A deadline is many times the usual time, and never less than a floor: slow is not dead.
"""

from __future__ import annotations

from cluster.core.limits import FRAME_FLOOR_S, FRAME_SLACK, FRAME_TIMEOUT_S, MAX_PATIENCE

_STEADY_FRAMES = 256
"""After this many frames, earlier overdue frames no longer extend deadlines."""
_FORGETS = 0.98
"""Decay per frame of the slowest time seen: a thousand frames after a stall, deadlines are as before."""


class FrameDeadlines:
    """The deadlines of one ring's frames. Times are in seconds of the injected clock; the ring starts at ``now``.

    ``alive_at`` is when a frame last came back, or when the ring started. ``overdue`` counts the recent rings that were
    closed because a frame was overdue; each doubles the deadlines, up to ``MAX_PATIENCE`` times.
    """

    def __init__(
        self, now: float, floor_s: float = FRAME_FLOOR_S, most_s: float = FRAME_TIMEOUT_S, overdue: int = 0
    ) -> None:
        self.alive_at = now
        self.overdue = overdue
        self._excused_at = now
        self._steady = 0
        self._floor_s = floor_s
        self._most_s = most_s
        self._step_s: float | None = None
        self._token_s = 0.0

    def learn(self, tokens: int, sent_at: float, now: float) -> None:
        """Learn from a frame that came back and prefilled ``tokens``; 0 for a decode step.

        Its time counts from the return of the frame before it, or from when it was sent into an empty ring.
        """
        took_s = now - self._counts_from(sent_at)
        self.alive_at = now
        self._steady += 1
        if self._steady >= _STEADY_FRAMES:
            self.overdue = 0
        if tokens:
            self._token_s = max(self._token_s * _FORGETS, took_s / tokens)
        step = 0.0 if tokens else took_s
        self._step_s = step if self._step_s is None else max(self._step_s * _FORGETS, step)

    def due_at(self, sent_at: float, tokens: int, more_s: float = 0.0) -> float:
        """Return the deadline of the oldest frame in the ring, which prefills ``tokens``.

        ``more_s`` is added for overloaded machines.
        """
        return self._counts_from(sent_at) + self.allowed_seconds(tokens) * self.growth + more_s

    def excuse(self, now: float) -> None:
        """Count the oldest frame's time anew: nobody looked for its return until ``now``."""
        self._excused_at = now

    def _counts_from(self, sent_at: float) -> float:
        return max(sent_at, self.alive_at, self._excused_at)

    @property
    def growth(self) -> float:
        """The factor by which recent overdue frames extend deadlines."""
        return min(MAX_PATIENCE, 2.0**self.overdue)

    def allowed_seconds(self, tokens: int) -> float:
        """Return the seconds, before ``growth``, in which a frame that prefills ``tokens`` must come back.

        They count from when the previous frame came back. Before the first frame of a kind has come back, kernels are
        being compiled and no time can be predicted; then return the maximum.
        """
        if self._step_s is None or (tokens and not self._token_s):
            return self._most_s
        return min(self._most_s, max(self._floor_s, FRAME_SLACK * (self._step_s + tokens * self._token_s)))
