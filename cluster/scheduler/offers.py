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
from cluster.scheduler.routing import UNMEASURED, LinearCost, Offer
from cluster.scheduler.sequence import ScheduledSequence
from cluster.scheduler.sharing import live_starts

_SMOOTHING: Final = 0.05
"""Weight of a frame or an answer among those before it."""
_TYPICAL_ANSWER: Final = 256.0
"""Tokens of an answer before one has ended."""
_ASSUMED_ROW: Final = 0.1
"""Share of a frame of one row that each further row adds before that is measured: the least that MLX's 4-bit matrix
products were seen to cost on Macs."""
_HALF_LIFE_S: Final = 60.0
"""After so long without a frame, a cost counts half: the Mac may have been disturbed, and nothing would correct it."""


class DecodeCost:
    """Learns what a decode frame costs all stages together, by its rows: a line through the last frames.

    The first frame does not count: the stages prepare their kernels for it.
    """

    def __init__(self) -> None:
        self._is_cold = True
        self._rows = self._us = self._rows_squared = self._rows_by_us = self._weight = 0.0

    def learn(self, rows: int, us: float) -> None:
        """Learn from a frame of ``rows`` sequences that took ``us`` microseconds."""
        if rows < 1 or us <= 0:
            return
        if self._is_cold:
            self._is_cold = False
            return
        share = max(_SMOOTHING, 1.0 / (self._weight + 1.0))
        self._weight += 1.0 - _SMOOTHING * self._weight
        self._rows += share * (rows - self._rows)
        self._us += share * (us - self._us)
        self._rows_squared += share * (rows * rows - self._rows_squared)
        self._rows_by_us += share * (rows * us - self._rows_by_us)

    def measured(self) -> LinearCost:
        """Return the cost of a frame by its rows.

        Frames of one length only do not tell what a row costs. Then it is assumed, so that a shared beginning does not
        gather all requests on one replica, where nobody would ever measure it.
        """
        spread = self._rows_squared - self._rows * self._rows
        if spread > 1e-2:
            slope = (self._rows_by_us - self._rows * self._us) / spread
        else:
            slope = self._us / (1.0 / _ASSUMED_ROW + self._rows - 1.0)
        slope = min(max(slope, 0.0), self._us / max(self._rows, 1.0))
        return LinearCost(self._us - slope * self._rows, slope, self._weight)


class Offers:
    """Makes the offers of one scheduler. ``open`` begins each epoch, whose stages may have other costs."""

    def __init__(self, requests: LiveRequests) -> None:
        self._requests = requests
        self._answer_tokens = 0.0
        self._learnt_at = 0.0

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

    def learn(self, rows: int, us: float, now: float) -> None:
        """Learn from a frame that came back. A decode frame has ``rows`` and took all stages ``us`` microseconds."""
        self._learnt_at = now
        self._decode.learn(rows, us)

    def learn_answer(self, tokens: int) -> None:
        """Learn from an answer that has ended."""
        self._answer_tokens += (_SMOOTHING if self._answer_tokens else 1.0) * (tokens - self._answer_tokens)

    def make(self, request: Request, now: float) -> Offer:
        """Return the offer for a request. Change nothing, not even which prefix was used last."""
        prompt, requests, memory = len(request.prompt), self._requests, self._memory
        kept = self._kept(request)
        ahead = sum(map(_left_to_read, self._lanes)) + requests.waiting.tokens_ahead(request.client, prompt)
        unread = max(ahead + prompt - kept, 1)
        live, most = len(requests.by_id), self._capacity.lanes * self._capacity.rows
        then = live + request.samples
        current = 0.5 ** (max(now - self._learnt_at, 0.0) / _HALF_LIFE_S)
        step = self._decode.measured()
        used = [u / b for u, b in zip(memory.prefixes.used, self._capacity.prefix_budget, strict=True) if b]
        return Offer(
            kept=kept,
            unread=unread,
            live=live,
            rows=max(min(then, most) / self._capacity.lanes, 1.0),
            steps=min(self._answer_tokens or _TYPICAL_ANSWER, max(request.max_tokens, 1)) * max(then / most, 1.0),
            read=self._read_cost(unread, current),
            step=step._replace(weight=step.weight * current),
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

    def _read_cost(self, tokens: int, current: float) -> LinearCost:
        """Return the cost of a token, in a prompt of so many. ``current``: by how much measurements still count."""
        seconds = self._prefill.seconds(tokens)
        return (
            UNMEASURED if seconds is None else LinearCost(0.0, seconds * 1e6 / tokens, self._prefill.weight * current)
        )


def _left_to_read(sequence: ScheduledSequence) -> int:
    """Return how many tokens of a prompt in a lane are still to be read, without those that its leader reads."""
    if sequence.leader:
        return max(sequence.prefill_length - sequence.awaits, 0)
    return max(sequence.prefill_length - sequence.prefilled, 0)
