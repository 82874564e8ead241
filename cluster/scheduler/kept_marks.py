"""Decides which marks of a sequence are dropped as it grows, and counts the memory of marks.

A mark is the state, at one length, of those caches of a sequence that cannot be trimmed. Another sequence can start
only there. Sequences and kept prefixes share marks: a mark costs its bytes once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass

from cluster.scheduler.kv_cost import Cost


@dataclass(frozen=True, slots=True, eq=False)
class KeptMark:
    """One mark on all stages, whoever holds it. ``cost``: its bytes, per stage."""

    cost: Cost


class MarkMemory:
    """The bytes of the marks that somebody holds, per stage. A mark with several holders counts once."""

    def __init__(self, stages: int) -> None:
        self._holders: Counter[KeptMark] = Counter()
        self._used = [0] * stages

    @property
    def used(self) -> Cost:
        return tuple(self._used)

    def hold(self, marks: Iterable[KeptMark]) -> None:
        for mark in marks:
            if not self._holders[mark]:
                self._add(mark, 1)
            self._holders[mark] += 1

    def release(self, marks: Iterable[KeptMark]) -> None:
        for mark in marks:
            self._holders[mark] -= 1
            if not self._holders[mark]:
                del self._holders[mark]
                self._add(mark, -1)

    def _add(self, mark: KeptMark, sign: int) -> None:
        for i, nbytes in enumerate(mark.cost):
            self._used[i] += sign * nbytes


def surplus(lengths: Iterable[int], now: int, fixed: Container[int]) -> list[int]:
    """Return the marks to drop from a sequence of ``now`` tokens that is marked at ``lengths``.

    After a drop, the two neighbours are no farther apart than the newer one is from ``now``. So the number of marks
    grows with the logarithm of ``now``. Marks in ``fixed`` are never dropped.
    """
    dropped: list[int] = []
    newer = now
    oldest_first = sorted(lengths)
    while oldest_first:
        length = oldest_first.pop()
        older = oldest_first[-1] if oldest_first else 0
        if length not in fixed and newer - older <= now - newer:
            dropped.append(length)
        else:
            newer = length
    return dropped


def space_out(lengths: Iterable[int], gap: Callable[[int], float], fixed: Collection[int]) -> set[int]:
    """Return those of ``lengths`` that are at least their ``gap`` from 0, from all in ``fixed``, and from each other.

    ``gap`` may grow with the length.
    """
    bounds, chosen, last = sorted(fixed), set[int](), 0
    for length in sorted(lengths):
        at = bisect_left(bounds, length)
        before = max(last, bounds[at - 1] if at else 0)
        if length - before >= gap(length) and (at == len(bounds) or bounds[at] - length >= gap(length)):
            chosen.add(length)
            last = length
    return chosen
