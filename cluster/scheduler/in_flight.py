"""Flights: the frames that are in the ring. It knows which may have overtaken which, so a lost one is noticed."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame
from cluster.scheduler.reordering import Touched
from cluster.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class InFlightFrame:
    """A frame in the ring: what it computes, for whom, how many prompt tokens it prefills, and all that it touches."""

    number: int
    lane: int
    compute: Compute | None
    sequences: tuple[int, ...]
    prefills: int
    sent_at: float
    touched: Touched = frozenset()


class InFlightFrames:
    """Frames of one epoch, in the order in which they were written."""

    def __init__(self) -> None:
        self._flights: dict[int, InFlightFrame] = {}
        self._leaving: dict[int, Sequence] = {}
        """Over, but a frame of theirs is in the ring: their rows and caches are still taken."""

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def prefills(self) -> int:
        """Prefill frames in the ring."""
        return sum(f.compute is Compute.PREFILL for f in self._flights.values())

    def oldest(self) -> tuple[float, int] | None:
        """When the frame longest in the ring was written, and what it prefills; None where the ring is empty."""
        return next(((f.sent_at, f.prefills) for f in self._flights.values()), None)

    @property
    def bare(self) -> bool:
        """Whether a frame of edits alone is in the ring."""
        return any(f.compute is None for f in self._flights.values())

    def meet(self, touched: Touched) -> bool:
        """Whether a frame in the ring touches any of these."""
        return any(not touched.isdisjoint(f.touched) for f in self._flights.values())

    def hold(self, sequence: Sequence) -> bool:
        """Whether a frame in the ring is about a sequence; it is remembered then, for ``left`` to return."""
        if held := self.meet(frozenset([("sequence", sequence.id)])):
            self._leaving[sequence.id] = sequence
        return held

    @property
    def leaving(self) -> tuple[Sequence, ...]:
        return tuple(self._leaving.values())

    def take_left(self) -> list[Sequence]:
        """Take out those of ``leaving`` whose last frame is back."""
        back = [s for s in self._leaving.values() if not self.meet(frozenset([("sequence", s.id)]))]
        for sequence in back:
            del self._leaving[sequence.id]
        return back

    def add(self, flight: InFlightFrame) -> None:
        self._flights[flight.number] = flight

    def land(self, frame: Frame) -> InFlightFrame:
        """Take out the frame that came back. Raises ``BadFrame`` for one that is not there, and where one was lost."""
        if frame.number not in self._flights:
            raise BadFrame(f"frame {frame.number} of epoch {frame.epoch} came back, which is not in the ring")
        flight = self._flights.pop(frame.number)
        told = [*(s.sequence for s in frame.samples), *(f.sequence for f in frame.failures)]
        if len(set(told)) < len(told):
            raise BadFrame(f"frame {frame.number} of epoch {frame.epoch} came back with two answers for one sequence")
        self._require_none_lost(flight)
        return flight

    def _require_none_lost(self, back: InFlightFrame) -> None:
        """An older frame may still be out only where ``cluster.scheduler.reordering`` lets it be overtaken."""
        behind_prefill = False
        for older in self._flights.values():
            if older.number > back.number:
                return
            prefill = older.compute is Compute.PREFILL
            behind_prefill = behind_prefill or prefill
            same = not set(older.sequences).isdisjoint(back.sequences)
            if same or not behind_prefill or (prefill and back.compute is Compute.PREFILL):
                raise BadFrame(f"frame {back.number} came back before frame {older.number}, which must have been lost")
