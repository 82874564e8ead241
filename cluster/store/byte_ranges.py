"""A set of byte ranges: which bytes of a file are present. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class ByteRanges:
    """Disjoint, sorted ranges ``[start, end)``. Adjacent ranges are merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add a range."""
        if start >= end:
            return
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Remove a range."""
        kept = [(a, b) for a, b in zip(self._starts, self._ends, strict=True) if b <= start or a >= end]
        for a, b in zip(self._starts, self._ends, strict=True):
            if a < end and b > start:
                kept += [piece for piece in ((a, start), (end, b)) if piece[0] < piece[1]]
        kept.sort()
        self._starts, self._ends = [a for a, _ in kept], [b for _, b in kept]

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the missing parts of ``[start, end)``, in order."""
        found = []
        at = start
        for i in range(bisect_right(self._ends, start), len(self._starts)):
            if self._starts[i] >= end:
                break
            if self._starts[i] > at:
                found.append((at, self._starts[i]))
            at = self._ends[i]
        if at < end:
            found.append((at, end))
        return found
