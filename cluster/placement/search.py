"""Finds the best layout by dynamic programming over sets of workers, the last worker of each, and clean cuts.

A state is a set of workers and the one that comes last. Its value is, for every cut, the minimum cost of the layers
before it. One step adds a stage: it takes the minimum over all positions where the stage can begin. This compares
every order of every subset without listing them. If there are too many workers for that, they are used in order of
speed, and any of them may be left out.

``LATENCY`` minimises the sum of stages and hops. Then, for the same workers in the same order, it minimises the slowest
stage, as long as the sum grows by no more than a slack. In this second step, workers count as equally fast if their
speeds differ no more than measurements do: the sum alone would give all layers but one to the seemingly fastest.
``THROUGHPUT`` minimises the slowest stage, then the sum. ``LATENCY`` with an acceptance minimises the time of a token
that is guessed right that often, which depends on both (``guessed_token_time``). It knows seconds; it refuses to know
bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise, product
from math import inf, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.core.limits import (
    BALANCE_SLACK,
    EQUAL_MACS_RATIO,
    GUESSED_GAP,
    MAX_HALVED,
    MAX_SEARCH,
    SPEED_NOISE_RATIO,
)
from cluster.core.plan import LayerRange, Objective
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.guessed_token_time import guessed_token_s, steady_token_s
from cluster.placement.stage_table import Matrix, StageTable

__all__ = ["BestLayout", "Search"]

Indices: TypeAlias = npt.NDArray[np.intp]
Key: TypeAlias = tuple[int, ...]
"""A set of workers: the count of each kind. In order of speed: the index of the last worker, and their number."""


@dataclass(frozen=True, slots=True)
class BestLayout:
    """A layout in pipeline order; ``seconds`` is the sum of stages and hops, ``slowest`` the slowest stage."""

    workers: tuple[Candidate, ...]
    ranges: tuple[LayerRange, ...]
    seconds: float
    slowest: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A transition: adding a stage on a worker of ``kind`` leads from any of the sets ``after`` to the set ``key``."""

    key: Key
    kind: int
    after: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """For every position: the minimum cost up to it, where the last stage begins, and the index in ``origins``.

    ``origins`` are the possible previous states, as pairs of set and last kind.
    """

    cost: Matrix
    begin: Indices
    before: Indices
    origins: tuple[tuple[Key, int], ...]


_States: TypeAlias = dict[Key, dict[int, _State]]
_Steps: TypeAlias = list[tuple[int, int, int]]
"""Each stage's kind and the positions where it begins and ends."""


class Search:
    """Searches the layouts of one model over some workers. ``visited`` counts the transitions that were tried."""

    def __init__(
        self,
        table: StageTable,
        candidates: Candidates,
        objective: Objective,
        *,
        acceptance: float = 0.0,
        unbounded: bool = False,
        noise: float = SPEED_NOISE_RATIO,
    ) -> None:
        self._table = table
        self._candidates = candidates
        self._objective = objective
        self._acceptance = acceptance
        self._noise = noise
        self._kinds = _kinds(candidates)
        self._transitions = _count_transitions(self._kinds)
        self.every_order = self._transitions <= MAX_SEARCH
        if not self.every_order:
            self._kinds = [[w] for w in sorted(candidates.workers, key=lambda w: -w.profile.bandwidth)]
            self._transitions = len(self._kinds) ** 2
        self._stages = [table.seconds(kind[0], unbounded=unbounded) for kind in self._kinds]
        self._unbounded = [table.seconds(kind[0], unbounded=True) for kind in self._kinds]
        self._hops = [[self._hop(a[0], b[-1]) for b in self._kinds] for a in self._kinds]
        self._runs: dict[float | None, _States] = {}
        self.visited = 0

    def _hop(self, one: Candidate, other: Candidate) -> Matrix:
        """Return the seconds of a hop at every position."""
        return np.array([self._candidates.hop_s(one, other, n) for n in self._table.boundary])

    def best(
        self, *, stage_count: int | None = None, including: Candidate | None = None, slack: float = BALANCE_SLACK
    ) -> BestLayout | None:
        """Return the best layout, or None if none fits.

        ``stage_count`` restricts the number of stages. ``including`` restricts the search to layouts that use that
        worker; it finds nothing if not every order is compared.
        """
        if self._objective is Objective.LATENCY and self._acceptance:
            return self._best_guessed(stage_count, including)
        limit = inf
        if self._objective is Objective.THROUGHPUT:
            limit = self._least(None, stage_count, including)[0]
        cost, key, last = self._least(limit, stage_count, including)
        if cost == inf:
            return None
        steps = self._trace_back(limit, key, last)
        if self._objective is Objective.LATENCY:
            steps = self._balance([kind for kind, _, _ in steps], slack) or steps
        return self._build_layout(steps)

    def _best_guessed(self, stage_count: int | None, including: Candidate | None) -> BestLayout | None:
        """Return the layout with the least expected time of a token, or None if none fits.

        First it is found without the time for which wrong guesses hold a stage. Then layers move between neighbours,
        and workers change places, while that makes a token faster.
        """
        steps = self._least_steady(stage_count, including)
        if steps is None:
            return None
        least = self._guessed_s(steps)
        for _ in self._table.positions:
            other = min(self._neighbours(steps), key=self._guessed_s, default=steps)
            if (seconds := self._guessed_s(other)) >= least:
                break
            steps, least = other, seconds
        return self._build_layout(steps)

    def _least_steady(self, stage_count: int | None, including: Candidate | None) -> _Steps | None:
        """Return the steps of the least ``steady_token_s``, within ``GUESSED_GAP``.

        For each number of stages, the sum can only grow as the limit on the slowest stage falls. So a range of limits
        is bounded from below by the sum at its upper end and the slowest stage at its lower end. Ranges that may hold a
        better layout are halved, the most promising first. If there are very many sets of workers, only a few are.
        """
        counts = [stage_count] if stage_count is not None else list(range(1, len(self._candidates.workers) + 1))
        ends = self._candidates.ends_s()
        ranges = [(self._steady_s(self._least(inf, n, including)[0] + ends, 0.0, n), n, 0.0, inf) for n in counts]
        heapify(ranges)
        best, least = None, inf
        for _ in range(max(1, MAX_HALVED // self._transitions)):
            if not ranges or ranges[0][0] >= least * (1 - GUESSED_GAP):
                break
            _, n, low, high = heappop(ranges)
            cost, key, last = self._least(high, n, including)
            steps = self._trace_back(high, key, last) if cost < inf else []
            if high < inf:
                del self._runs[high]
            if not steps:
                continue
            lap, slowest = cost + ends, max(float(self._stages[kind][a, b]) for kind, a, b in steps)
            if (seconds := self._steady_s(lap, slowest, n)) < least:
                best, least = steps, seconds
            middle = (low + slowest) / 2
            for down, up in ((low, middle), (middle, slowest * (1 - 1e-9))):
                if down < up:
                    heappush(ranges, (self._steady_s(lap, down, n), n, down, up))
        return best

    def _steady_s(self, lap_s: float, slowest_s: float, stages: int) -> float:
        return inf if lap_s == inf else steady_token_s(lap_s, slowest_s, stages, self._acceptance)

    def _guessed_s(self, steps: _Steps) -> float:
        seconds = [float(self._stages[kind][a, b]) for kind, a, b in steps]
        hops = sum(float(self._hops[one[0]][other[0]][other[1]]) for one, other in pairwise(steps))
        return guessed_token_s(seconds, hops + self._candidates.ends_s(), self._acceptance)

    def _neighbours(self, steps: _Steps) -> Iterator[_Steps]:
        """Yield the layouts with one cut moved by a position, or with the workers of two neighbours exchanged."""
        for i in range(1, len(steps)):
            (one, a, cut), (other, _, b) = steps[i - 1], steps[i]
            moved = [(one, other, at) for at in (cut - 1, cut + 1) if a < at < b]
            exchanged = [(other, one, at) for at in range(a + 1, b) if one != other]
            for first, second, at in (*moved, *exchanged):
                yield [*steps[: i - 1], (first, a, at), (second, at, b), *steps[i + 1 :]]

    def _least(
        self, limit: float | None, stage_count: int | None, including: Candidate | None
    ) -> tuple[float, Key, int]:
        """Return the cost, set and last kind of the cheapest layout. Of equal costs, fewer stages win."""
        ends = [
            (float(state.cost[-1]), self._count(key), key, last)
            for key, lasts in self._states(limit).items()
            if self._is_candidate(key, stage_count, including)
            for last, state in lasts.items()
        ]
        cost, _, key, last = min(ends, default=(inf, 0, (), 0))
        return cost, key, last

    def _is_candidate(self, key: Key, stage_count: int | None, including: Candidate | None) -> bool:
        if self._count(key) != stage_count if stage_count is not None else self._count(key) == 0:
            return False
        if including is None:
            return True
        return self.every_order and all(key[i] for i, kind in enumerate(self._kinds) if including in kind)

    def _count(self, key: Key) -> int:
        return sum(key) if self.every_order else key[1]

    def _states(self, limit: float | None) -> _States:
        """Return every reachable state, cached by ``limit``.

        States minimise the sum over stages no slower than ``limit`` seconds, or the slowest stage if it is None.
        """
        if limit not in self._runs:
            self._runs[limit] = self._run(limit)
        return self._runs[limit]

    def _run(self, limit: float | None) -> _States:
        stages = self._stages if limit is None else [np.where(s > limit, inf, s) for s in self._stages]
        start = np.full(len(self._table.positions), inf)
        start[0] = 0.0
        nowhere = np.zeros(len(start), np.intp)
        empty = (0,) * len(self._kinds) if self.every_order else (-1, 0)
        states: _States = {empty: {-1: _State(start, nowhere, nowhere, ())}}
        for step in self._subsets() if self.every_order else self._chains():
            self.visited += 1
            states.setdefault(step.key, {})[step.kind] = self._extend(states, step, stages[step.kind], limit is None)
        return states

    def _subsets(self) -> Iterator[_Step]:
        """Yield the transitions to every set of workers, after those to its subsets, for each possible last kind."""
        sizes = [range(len(kind) + 1) for kind in self._kinds]
        for key in sorted(product(*sizes), key=sum):
            for kind, count in enumerate(key):
                if count:
                    yield _Step(key, kind, ((*key[:kind], count - 1, *key[kind + 1 :]),))

    def _chains(self) -> Iterator[_Step]:
        """Yield the transitions of layouts that keep the workers in order of speed and may leave some out.

        A key is the last worker and the number of stages.
        """
        for kind in range(len(self._kinds)):
            yield _Step((kind, 1), kind, ((-1, 0),))
            for count in range(2, kind + 2):
                yield _Step((kind, count), kind, tuple((i, count - 1) for i in range(count - 2, kind)))

    def _extend(self, states: _States, step: _Step, stage: Matrix, slowest: bool) -> _State:
        """Add a stage: at every position choose the best previous state, then the best beginning of the stage."""
        origins = tuple((key, last) for key in step.after for last in states[key])
        costs = np.array([self._arrival_cost(states, key, last, step.kind, slowest) for key, last in origins])
        before, cost = costs.argmin(axis=0), costs.min(axis=0)
        totals = np.maximum(cost[:, None], stage) if slowest else cost[:, None] + stage
        begin = totals.argmin(axis=0)
        return _State(totals[begin, np.arange(len(cost))], begin, before[begin], origins)

    def _arrival_cost(self, states: _States, key: Key, last: int, kind: int, slowest: bool) -> Matrix:
        cost = states[key][last].cost
        return cost if last < 0 or slowest else cost + self._hops[last][kind]

    def _trace_back(self, limit: float, key: Key, last: int) -> _Steps:
        """Return each stage's kind and the positions where it begins and ends, traced back from the end."""
        states = self._states(limit)
        at = len(self._table.positions) - 1
        steps = []
        while at > 0:
            state = states[key][last]
            steps.append((last, int(state.begin[at]), at))
            (key, last), at = state.origins[int(state.before[at])], int(state.begin[at])
        return steps[::-1]

    def _balance(self, order: Sequence[int], slack: float) -> _Steps | None:
        """Return the layout in that order whose slowest stage is fastest, of those with a sum within the slack.

        Workers of about the same speed count as equally fast.
        """
        stages = self._evened_stages(order)
        every = np.unique(np.concatenate([stages[kind].ravel() for kind in order]))
        limits = every[np.isfinite(every)]
        bound = self._chain(order, stages, inf)[0] * (1 + slack)
        bound *= 1 + 1e-12  # rounding: the same numbers are summed in another order
        i = bisect_left(range(len(limits)), True, key=lambda i: self._chain(order, stages, limits[i])[0] <= bound)
        return self._chain(order, stages, limits[i])[1] if i < len(limits) else None

    def _evened_stages(self, order: Sequence[int]) -> dict[int, Matrix]:
        """Return the stages of each kind in an order as if all kinds of about the same speed were equally fast."""
        share = max(bisect_left(self._table.positions, self._table.positions[-1] / len(order)), 1)
        groups: list[list[int]] = []
        for kind in sorted(set(order), key=lambda kind: self._unbounded[kind][0, share]):
            group = next((g for g in groups if all(self._is_as_fast(kind, one, share) for one in g)), None)
            if group is None:
                groups.append([kind])
            else:
                group.append(kind)
        stages: dict[int, Matrix] = {}
        for group in groups:
            mean = np.mean([self._unbounded[kind] for kind in group], axis=0)
            stages |= {kind: np.where(np.isfinite(self._stages[kind]), mean, inf) for kind in group}
        return stages

    def _is_as_fast(self, one: int, other: int, share: int) -> bool:
        """Return whether two kinds are about as fast: equal Macs with a ``share`` of the model, others with any stage.

        How a stage's time grows with its layers is known worse than the time of a stage like those measured.
        """
        macs = [self._kinds[kind][0].hardware for kind in (one, other)]
        equal = macs[0] is not None and macs[0] == macs[1]
        stages = [self._unbounded[kind] for kind in (one, other)]
        a, b = [matrix[0, share] if equal else matrix[np.isfinite(matrix)] for matrix in stages]
        ratio = EQUAL_MACS_RATIO if equal else self._noise
        return bool(np.all(a <= b * ratio) and np.all(b <= a * ratio))

    def _chain(self, order: Sequence[int], stages: Mapping[int, Matrix], limit: float) -> tuple[float, _Steps]:
        """Return the minimum sum in that order with no stage slower than ``limit``, and its stages."""
        cost, begins = np.full(len(self._table.positions), inf), []
        cost[0] = 0.0
        for before, kind in pairwise((-1, *order)):
            arriving = cost if before < 0 else cost + self._hops[before][kind]
            totals = arriving[:, None] + np.where(stages[kind] > limit, inf, stages[kind])
            begins.append(totals.argmin(axis=0))
            cost = totals.min(axis=0)
        steps, at = [], len(cost) - 1
        for kind, begin in zip(reversed(order), reversed(begins), strict=True):
            steps.append((kind, int(begin[at]), at))
            at = int(begin[at])
        return float(cost[-1]), steps[::-1]

    def _build_layout(self, steps: Sequence[tuple[int, int, int]]) -> BestLayout:
        free = [list(kind) for kind in self._kinds]
        seconds = [float(self._stages[kind][a, b]) for kind, a, b in steps]
        hops = [float(self._hops[one[0]][other[0]][other[1]]) for one, other in pairwise(steps)]
        cuts = self._table.positions
        return BestLayout(
            tuple(free[kind].pop(0) for kind, _, _ in steps),
            tuple(LayerRange(cuts[a], cuts[b]) for _, a, b in steps),
            sum(seconds) + sum(hops),
            max(seconds),
        )


def _kinds(candidates: Candidates) -> list[list[Candidate]]:
    """Group interchangeable workers. With measured links, every worker is a group of its own."""
    found: dict[object, list[Candidate]] = {}
    for worker in candidates.workers:
        found.setdefault(worker.name if candidates.links else worker.kind, []).append(worker)
    return list(found.values())


def _count_transitions(kinds: Sequence[Sequence[Candidate]]) -> int:
    """Return an upper bound of the number of transitions that a comparison of every order tries."""
    return prod(len(kind) + 1 for kind in kinds) * len(kinds)
