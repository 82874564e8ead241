"""Makes a scheduler's offer for a request: how much of the prompt it keeps, and how long it would take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.core.request import Request
from cluster.scheduler.cache_accounting import CacheMemory
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.lanes import LaneAssignment
from cluster.scheduler.live_requests import LiveRequests
from cluster.scheduler.prefill_budget import PrefillBudget
from cluster.scheduler.routing import Offer
from cluster.scheduler.sequence import ScheduledSequence
from cluster.scheduler.sharing import live_starts

_SMOOTHING: Final = 0.05
"""Weight of a frame or an answer among those before it."""
_TYPICAL_ANSWER: Final = 256.0
"""Tokens of an answer before one has ended."""


class DecodeCost:
    """Learns what a decode frame costs all stages together, by its rows: a line through the last frames."""

    def __init__(self) -> None:
        self._rows = self._us = self._rows_squared = self._rows_by_us = 0.0
        self._known = False

    def learn(self, rows: int, us: float) -> None:
        """Learn from a frame of ``rows`` sequences that took ``us`` microseconds."""
        if rows < 1 or us <= 0:
            return
        weight = _SMOOTHING if self._known else 1.0
        self._known = True
        self._rows += weight * (rows - self._rows)
        self._us += weight * (us - self._us)
        self._rows_squared += weight * (rows * rows - self._rows_squared)
        self._rows_by_us += weight * (rows * us - self._rows_by_us)

    def seconds(self, rows: float) -> float | None:
        """Return the seconds of a frame of ``rows`` sequences; None before the first one.

        Frames of one length only do not tell what a row costs. Then rows are free, as for a GPU that reads weights.
        """
        if not self._known:
            return None
        spread = self._rows_squared - self._rows * self._rows
        slope = (self._rows_by_us - self._rows * self._us) / spread if spread > 1e-2 else 0.0
        slope = min(max(slope, 0.0), self._us / max(self._rows, 1.0))
        return max(self._us + slope * (rows - self._rows), 0.0) / 1e6


class Offers:
    """Makes the offers of one scheduler. ``open`` begins each epoch, whose stages may have other costs."""

    def __init__(self, requests: LiveRequests) -> None:
        self._requests = requests
        self._answer_tokens = 0.0

    def open(
        self,
        capacity: Capacity,
        lanes: LaneAssignment,
        memory: CacheMemory,
        prefill: PrefillBudget,
        sources: Callable[[ScheduledSequence], list[ScheduledSequence]],
    ) -> None:
        """Begin an epoch. ``sources`` returns the live sequences from which one may start."""
        self._capacity, self._lanes, self._memory, self._prefill = capacity, lanes, memory, prefill
        self._sources = sources
        self._decode = DecodeCost()

    def learn_decode(self, rows: int, us: float) -> None:
        """Learn from a decode frame of one token a row, which took all stages ``us`` microseconds."""
        self._decode.learn(rows, us)

    def learn_answer(self, tokens: int) -> None:
        """Learn from an answer that has ended."""
        self._answer_tokens += (_SMOOTHING if self._answer_tokens else 1.0) * (tokens - self._answer_tokens)

    def make(self, request: Request) -> Offer:
        """Return the offer for a request. Change nothing, not even which prefix was used last."""
        prompt, requests, memory = len(request.prompt), self._requests, self._memory
        kept = self._kept(request)
        ahead = sum(map(_left_to_read, self._lanes)) + requests.waiting.tokens_ahead(request.client, prompt)
        unread = max(ahead + prompt - kept, 1)
        live = len(requests.by_id)
        used = [u / b for u, b in zip(memory.prefixes.used, self._capacity.prefix_budget, strict=True) if b]
        return Offer(
            kept=kept,
            unread=unread,
            read_s=self._prefill.seconds(unread),
            answer_s=self._answer_s(request, live + request.samples),
            live=live,
            filled=max(used, default=0.0),
            fits=not memory.why_never_fits(prompt + request.max_tokens),
            has_room=len(requests.waiting) + request.samples <= self._capacity.queue,
            is_live=request.id in requests.by_id,
        )

    def _kept(self, request: Request) -> int:
        sequence = ScheduledSequence(request, 0)
        kept = self._memory.prefixes.longest(sequence.owner, sequence.beginning)
        trimmable = self._capacity.mark_cost_of is None
        live = live_starts(sequence, self._sources(sequence), trimmable=trimmable)
        return max((kept, *(max(start.now, start.later) for start in live)))

    def _answer_s(self, request: Request, live: int) -> float | None:
        """Return the seconds of an answer while ``live`` samples decode; those beyond the lanes wait for others."""
        lanes, most = self._capacity.lanes, self._capacity.lanes * self._capacity.rows
        step_s = self._decode.seconds(max(min(live, most) / lanes, 1.0))
        if step_s is None:
            return None
        tokens = min(self._answer_tokens or _TYPICAL_ANSWER, max(request.max_tokens, 1))
        return tokens * step_s * max(live / most, 1.0)


def _left_to_read(sequence: ScheduledSequence) -> int:
    """Return how many tokens of a prompt in a lane are still to be read, without those that its leader reads."""
    if sequence.leader:
        return max(sequence.prefill_length - sequence.awaits, 0)
    return max(sequence.prefill_length - sequence.prefilled, 0)
