"""Writes the frames of one epoch, and tracks pending edits and the frames in the ring.

Edits keep their order and travel on the next frame. The exception: an edit that touches what a frame in the ring
touches would make a decode frame wait for that frame, and delay its tokens. Then the edits travel in a frame of their
own. The trims that a step of guessed sequences needs always travel with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.frames import Compute, Edit, Frame, Step, Trim
from cluster.scheduler.in_flight import InFlightFrame, InFlightFrames
from cluster.scheduler.pending_edits import first_load, tidy
from cluster.scheduler.reordering import find_touched_by


class FrameWriter:
    """The frame log of ``epoch``. The scheduler appends to ``edits`` at any time; ``written`` counts frames."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self.flights = InFlightFrames()
        self.edits: list[Edit] = []
        self.written = 0

    def write(self, lane: int, step: Step, prefills: int, now: float, trims: Sequence[Trim] = ()) -> Frame:
        """Write a frame for ``step``, with ``trims``. It carries the pending edits too, unless they would delay it.

        A guess carries none: it lets frames of others go first, and these may need the edits.
        """
        sequences = step.sequences
        edits_wait = step.compute is Compute.DECODE and (step.guessed or self._edits_would_delay(sequences))
        return self._write_frame(lane, sequences, prefills, 0 if edits_wait else len(self.edits), step, now, trims)

    def write_overflow(self, now: float) -> list[Frame]:
        """Write edit-only frames until the pending edits, and the grammars in them, fit into one frame."""
        self.edits[:] = tidy(self.edits)
        frames = []
        while count := first_load(self.edits):
            frames.append(self._write_frame(-1, (), 0, count, None, now))
        return frames

    def write_remaining(self, now: float) -> list[Frame]:
        """Write one edit-only frame for the edits that no step carried.

        At most one such frame is in the ring at a time, so that a slow ring gets few frames with many edits each.
        """
        if not self.edits or self.flights.has_edits_only:
            return []
        return [self._write_frame(-1, (), 0, len(self.edits), None, now)]

    def ask(self, now: float) -> Frame:
        """Write a frame without a step, whose reply brings the samples that were deferred."""
        return self._write_frame(-1, (), 0, len(self.edits), None, now)

    def _edits_would_delay(self, sequences: tuple[int, ...]) -> bool:
        """Return whether a step of ``sequences`` needs no pending edit, but would wait for a frame with them."""
        own, edited = find_touched_by(sequences, ()), find_touched_by((), self.edits)
        return own.isdisjoint(edited) and self.flights.touches(edited)

    def _write_frame(
        self,
        lane: int,
        sequences: tuple[int, ...],
        prefills: int,
        count: int,
        step: Step | None,
        now: float,
        trims: Sequence[Trim] = (),
    ) -> Frame:
        """Write a frame that carries the first ``count`` edits, then ``trims``."""
        number = self.written
        edits = (*self.edits[:count], *trims)
        compute = step.compute if step else None
        self.written += 1
        del self.edits[:count]
        scoring, touched = step.scoring if step else None, find_touched_by(sequences, edits)
        guessed, sampled = (step.guessed, max(step.sampled, 1)) if step else (False, 1)
        self.flights.add(
            InFlightFrame(number, lane, compute, sequences, prefills, now, touched, scoring, guessed, sampled)
        )
        return Frame(self._epoch, max(lane, 0), number, edits, step)
