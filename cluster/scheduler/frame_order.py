"""Lets frames run on a stage in the order of their numbers, whatever the order in which they arrive.

The ranks of a group wait for each other within a step, so all must run the same frames in the same order. No frame
overtakes another there, and none becomes void by one that has arrived behind it: both depend on when frames arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame
from cluster.core.limits import MAX_FRAMES_WAITING


@dataclass(slots=True)
class _NumberedFrame:
    frame: Frame
    ready: bool


class FrameOrder:
    """The frames that wait on one stage of a group; a twin of ``ReorderBuffer``. An epoch's first frame is number 0."""

    def __init__(self) -> None:
        self._waiting: dict[int, _NumberedFrame] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, frame: Frame, *, ready: bool) -> None:
        """Add a frame that arrived. A frame that is not ``ready`` still lacks its tensors.

        Raise ``BadFrame`` if ``MAX_FRAMES_WAITING`` frames wait already, or if this one came before.
        """
        if len(self._waiting) >= MAX_FRAMES_WAITING:
            raise BadFrame(f"too many frames wait on one stage: {len(self._waiting)}")
        if frame.number < self._next or frame.number in self._waiting:
            raise BadFrame(f"frame {frame.number} arrived twice")
        self._waiting[frame.number] = _NumberedFrame(frame, ready)

    def waiting_without_tensors(self, number: int) -> Frame | None:
        """Return the waiting frame ``number`` if it lacks its tensors, else None."""
        waiting = self._waiting.get(number)
        return waiting.frame if waiting and not waiting.ready else None

    def complete(self, frame: Frame) -> None:
        """Replace a waiting frame by the complete ``frame``: its tensors arrived."""
        if waiting := self._waiting.get(frame.number):
            waiting.frame, waiting.ready = frame, True

    def take(self) -> Frame | None:
        """Remove and return the frame that follows the last one, or None if it is not here or lacks its tensors."""
        waiting = self._waiting.get(self._next)
        if waiting is None or not waiting.ready:
            return None
        del self._waiting[self._next]
        self._next += 1
        return waiting.frame
