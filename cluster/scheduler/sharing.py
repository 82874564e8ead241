"""Finds how much of a prompt can be copied from live sequences, and which copies a failed step has spoiled.

A live sequence is as good a beginning as a kept prefix: it is copied by edits that follow its frames in the log. If a
live sequence is still prefilling tokens that another one shares, the other waits instead of prefilling them again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cluster.scheduler.in_flight import InFlightFrames
from cluster.scheduler.radix import shared_length
from cluster.scheduler.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class LiveStart:
    """What a sequence can use of ``source``, in tokens: ``now``, and ``later``, once the source has read more.

    ``shared``: how many first tokens both have.
    """

    source: ScheduledSequence
    shared: int
    now: int
    later: int


def live_starts(
    sequence: ScheduledSequence, sources: Iterable[ScheduledSequence], *, trimmable: bool
) -> list[LiveStart]:
    """Return what ``sequence`` can use of each source. At least its last token is left to compute."""
    return [_live_start(sequence, source, trimmable) for source in sources]


def _live_start(sequence: ScheduledSequence, source: ScheduledSequence, trimmable: bool) -> LiveStart:
    shared = min(_shared(sequence, source), sequence.prefill_length)
    usable = min(shared, len(sequence.beginning) - 1)
    fed = source.certain_length
    if trimmable or (fed <= usable and source.exact):
        now = min(fed, usable)
    else:
        now = max((at for at in source.marks if at <= usable), default=0)
    later = 0 if source.ended else min(usable, source.prefill_length)
    return LiveStart(source, shared, now, later if later > fed else now)


def _shared(sequence: ScheduledSequence, source: ScheduledSequence) -> int:
    prompt = shared_length(sequence.base, source.base)
    if prompt < len(source.base):
        return prompt
    return prompt + shared_length(list(sequence.base[prompt:]), source.fed[prompt : source.certain_length])


def best_leader(starts: Iterable[LiveStart], alone: int, least: int) -> LiveStart | None:
    """Return the start that is worth waiting for: its source is prefilling at least ``least`` more tokens of use.

    ``alone`` is where the sequence could start now. A source that has not got that far would take longer than
    prefilling alone, so it is not waited for.
    """
    worth = (s for s in starts if s.later >= alone + least and len(s.source.fed) >= alone)
    return max(worth, key=lambda s: (s.later, len(s.source.fed)), default=None)


@dataclass(frozen=True, slots=True)
class _Copy:
    source: int
    copy: int
    number: int


class Copies:
    """The copies of live sequences that a frame in the ring may still spoil, by the ids of sequences."""

    def __init__(self) -> None:
        self._copies: list[_Copy] = []

    def add(self, source: int, copy: int, number: int) -> None:
        """Record a copy whose edits travel on frame ``number`` or on a later one, but before the source's next step."""
        self._copies.append(_Copy(source, copy, number))

    def find_spoiled(self, failed: Collection[int], number: int) -> set[int]:
        """Return the copies, and copies of these, made after a step of ``failed`` that failed in frame ``number``."""
        found: set[int] = set()
        for each in self._copies:  # in the order in which they were made
            if each.source in found or (each.source in failed and each.number > number):
                found.add(each.copy)
        return found

    def prune(self, flights: InFlightFrames) -> None:
        """Forget the copies whose source has no frame in the ring from before the copy."""
        self._copies = [c for c in self._copies if flights.touches_before(c.source, c.number)]
