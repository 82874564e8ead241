"""The log of one epoch: frames as they are written, the edits that wait for one, and what is in the ring.

Edits keep their order and ride on the next frame, unless that would make somebody's token wait for a frame in the ring
that they touch; then they go by themselves.
"""

from __future__ import annotations

from cluster.core.frames import Compute, Edit, Frame, Step
from cluster.scheduler.in_flight import InFlightFrame, InFlightFrames
from cluster.scheduler.pending_edits import first_load, tidy
from cluster.scheduler.reordering import touched_by


class FrameWriter:
    """``edits`` may be added to at any time; ``written`` counts frames."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self.flights = InFlightFrames()
        self.edits: list[Edit] = []
        self.written = 0

    def write(self, lane: int, step: Step, prefills: int, now: float) -> Frame:
        """The next frame, with the edits that wait unless they would hold it up."""
        sequences = step.sequences
        held = step.compute is Compute.DECODE and self._delays(sequences)
        return self._write_frame(lane, sequences, prefills, 0 if held else len(self.edits), step, now)

    def heavy(self, now: float) -> list[Frame]:
        """Frames of edits alone, as long as those that wait are too many, or their grammars too long, for one frame."""
        self.edits[:] = tidy(self.edits)
        frames = []
        while count := first_load(self.edits):
            frames.append(self._write_frame(-1, (), 0, count, None, now))
        return frames

    def rest(self, now: float) -> list[Frame]:
        """A frame for the edits that no step took along; one in the ring at a time: in a slow one they gather."""
        if not self.edits or self.flights.bare:
            return []
        return [self._write_frame(-1, (), 0, len(self.edits), None, now)]

    def _delays(self, sequences: tuple[int, ...]) -> bool:
        """Whether a step of these, which needs none of the edits, would wait with them for a frame in the ring."""
        own, edited = touched_by(sequences, ()), touched_by((), self.edits)
        return own.isdisjoint(edited) and self.flights.meet(edited)

    def _write_frame(
        self, lane: int, sequences: tuple[int, ...], prefills: int, count: int, step: Step | None, now: float
    ) -> Frame:
        """A frame that takes the first ``count`` edits along."""
        number, edits, compute = self.written, tuple(self.edits[:count]), step.compute if step else None
        self.written += 1
        del self.edits[:count]
        self.flights.add(InFlightFrame(number, lane, compute, sequences, prefills, now, touched_by(sequences, edits)))
        return Frame(self._epoch, max(lane, 0), number, edits, step)
