"""Search for the most expensive input: seeds first, then mutations of the most expensive ones so far.

Most candidates are tried small, where a try is cheap; the most expensive ones then grow to the bound. A cost above the
bounds is measured again and the least counts, since other programs of the machine only make an input slower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import Random
from typing import Final

from fuzz.cost.measure import Cost, measure
from fuzz.cost.recipe import Recipe, build, filled, size, worsened
from fuzz.cost.stand_in import SANDBOX
from fuzz.cost.target import KEPT_OUT, SANDBOX_CLOSED, CostTarget, Entry

SMALL_SHARE: Final = 32
"""Candidates are tried at this part of the bound first."""
GROWN_EVERY: Final = 4
"""Of so many candidates one is grown to the bound."""
TRIES: Final = 3
"""Measurements of an input that is over, the least of which counts."""
KEPT: Final = 12
"""Of the dearest inputs, from which the next ones are made."""


@dataclass(frozen=True, slots=True)
class Tried:
    """An input and its cost, measured alone."""

    name: str
    recipe: Recipe
    cost: Cost
    score: float


@dataclass(slots=True)
class Found:
    """The dearest inputs of a target, the dearest first; ``together`` is what the dearest costs many times at once.

    ``faults`` are inputs that ended otherwise than taken or refused with a typed error.
    """

    target: CostTarget
    inputs: int = 0
    dearest: list[Tried] = field(default_factory=list)
    together: Cost | None = None
    over: bool = False
    faults: list[Tried] = field(default_factory=list)


class Search:
    """Searches one target, which is prepared once; measurements are forks."""

    def __init__(self, target: CostTarget, rng: Random) -> None:
        self.target, self._rng = target, rng
        self._entry: Entry = target.prepare()
        self.found = Found(target)

    def run(self, kept: Sequence[tuple[str, Recipe]], inputs: int, seconds: float = inf) -> Found:
        """Run the stored inputs, the seeds, then worse ones, ``inputs`` in all, but at least the stored ones.

        Start no further input once ``seconds`` have passed.
        """
        end = time.monotonic() + seconds
        known = [*kept, *self.target.seeds().items()]
        known = [(name, recipe) for name, recipe in known if recipe != "" or name == "plain"]
        for name, recipe in known[: max(len(kept), inputs)]:
            if time.monotonic() < end:
                self._try(name, recipe)
        for number, recipe in enumerate(self._worse(inputs - len(known))):
            if time.monotonic() >= end:
                break
            self._try("found", recipe, at_least=self._small if number % GROWN_EVERY else self.target.limit)
        if self.found.dearest and self.target.at_once > 1:
            dearest = self.found.dearest[0].recipe
            self.found.together = self.measured(dearest, self.target.at_once)
            self.found.over = self.score(self.found.together, dearest) > 1
        self.found.over |= any(one.score > 1 for one in self.found.dearest)
        return self.found

    def measured(self, recipe: Recipe, copies: int = 1) -> Cost:
        """Return an input's cost; the least of a few measurements if it is above the bounds."""
        data = build(recipe)
        take, warm = partial(_take, self._entry, data), partial(_warm, self._entry, data, self._entry.sandbox)
        cost = measure(take, copies, warm)
        if cost.outcome == SANDBOX_CLOSED:  # most inputs do not come so far, and to open one takes a second
            warm = partial(_warm, self._entry, data, True)
            cost = measure(take, copies, warm)
        for _ in range(TRIES - 1):
            if self.score(cost, recipe) <= 1 or cost.killed:
                break
            cost = min(cost, measure(take, copies, warm), key=lambda one: self.score(one, recipe))
        return cost

    def score(self, cost: Cost, recipe: Recipe) -> float:
        """Return a value above 1 if an input costs more than allowed."""
        return cost.score(*self.target.children(size(recipe)), self.target.cpu_s)

    @property
    def _small(self) -> int:
        return max(256, self.target.limit // SMALL_SHARE)

    def _worse(self, count: int) -> Iterator[Recipe]:
        """Return mutated copies of the most expensive inputs so far."""
        for _ in range(max(0, count)):
            pool = [tried.recipe for tried in self.found.dearest[:KEPT]]
            if not pool:
                return
            yield worsened(self._rng.choice(pool), self._rng, pool, self.target.atoms)

    def _tried(self, name: str, recipe: Recipe) -> Tried:
        cost = self.measured(recipe)
        return Tried(name, recipe, cost, self.score(cost, recipe))

    def _try(self, name: str, recipe: Recipe, at_least: int | None = None) -> None:
        """Measure a recipe; ``at_least`` scales it to that many bytes."""
        if at_least is not None:
            recipe = filled(recipe, at_least) or recipe
        if size(recipe) > self.target.limit:
            recipe = filled(recipe, self.target.limit)
        if recipe == "" and name != "plain":
            return
        self.found.inputs += 1
        tried = self._tried(name, recipe)
        if tried.cost.outcome.startswith("!!"):
            self.found.faults.append(tried)
        self.found.dearest.append(tried)
        self.found.dearest.sort(key=lambda one: -one.score)
        del self.found.dearest[2 * KEPT :]


async def _take(entry: Entry, data: bytes, copy: int) -> str:
    return await entry.take(data)


async def _warm(entry: Entry, data: bytes, sandbox: bool) -> str:
    if sandbox:
        await SANDBOX.open()
    return KEPT_OUT if entry.lets_in and not await entry.lets_in(data) else ""
