"""Chooses the next frame to run on a stage. A decode frame may overtake waiting prefill frames.

Frames that touch different sequences and different kept prefixes commute: a stage may run them in either order and
ends in the same state. A decode frame takes a few milliseconds and a client is waiting for its token; a prefill frame
takes much longer. So decode frames go first, but each lane may overtake a prefill frame only once. A next token waits
for at most one chunk per stage, and no prompt starves behind lanes that decode without pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Drop, Edit, Frame, Restore, Save
from cluster.core.limits import MAX_FRAMES_WAITING

Touched = frozenset[tuple[str, int]]
"""Sequences and kept prefixes, as pairs of kind (``sequence`` or ``prefix``) and id."""


@dataclass(slots=True)
class _WaitingFrame:
    frame: Frame
    ready: bool
    touched: Touched


class ReorderBuffer:
    """The frames that wait on one stage, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[_WaitingFrame] = []
        self._overtook: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Frame]:
        return (w.frame for w in self._waiting)

    def add(self, frame: Frame, *, ready: bool) -> None:
        """Add a frame that arrived. A frame that is not ``ready`` still lacks its tensors.

        Raise ``BadFrame`` if ``MAX_FRAMES_WAITING`` frames wait already.
        """
        if len(self._waiting) >= MAX_FRAMES_WAITING:
            raise BadFrame(f"too many frames wait on one stage: {len(self._waiting)}")
        self._waiting.append(_WaitingFrame(frame, ready, touched(frame)))

    def waiting_without_tensors(self, number: int) -> Frame | None:
        """Return the waiting frame ``number`` if it lacks its tensors, else None."""
        return next((w.frame for w in self._waiting if w.frame.number == number and not w.ready), None)

    def complete(self, frame: Frame) -> None:
        """Replace a waiting frame by the complete ``frame``: its tensors arrived."""
        for waiting in self._waiting:
            if waiting.frame.number == frame.number:
                waiting.frame, waiting.ready = frame, True

    def take(self) -> Frame | None:
        """Remove and return the frame to run next, or None if no frame can run yet."""
        if not self._waiting:
            return None
        head = self._waiting[0]
        if _is_prefill(head.frame) and (overtaking := self._find_overtaking(head)):
            if (
                head.ready
            ):  # overtaking a head without tensors delays nothing, so it does not use up this lane's one turn
                self._overtook.add(overtaking.frame.lane)
            return self._take_out(overtaking)
        if not head.ready:
            return None
        if _is_prefill(head.frame):
            self._overtook.clear()
        return self._take_out(head)

    def _take_out(self, waiting: _WaitingFrame) -> Frame:
        self._waiting.remove(waiting)
        return waiting.frame

    def _find_overtaking(self, head: _WaitingFrame) -> _WaitingFrame | None:
        """Return the first decode frame that commutes with all frames before it and may still overtake ``head``.

        Its lane must not have overtaken ``head`` yet, if ``head`` is ready to run.
        """
        spent = self._overtook if head.ready else frozenset()
        before: set[tuple[str, int]] = set()
        for waiting in self._waiting:
            eligible = waiting.ready and _is_urgent(waiting.frame) and waiting.frame.lane not in spent
            if eligible and before.isdisjoint(waiting.touched):
                return waiting
            before |= waiting.touched
        return None


def touched(frame: Frame) -> Touched:
    """Return the sequences and prefixes whose state a frame reads or changes."""
    rows = frame.step.sequences if frame.step else ()
    return touched_by(rows, frame.edits)


def touched_by(sequences: Iterable[int], edits: Iterable[Edit]) -> Touched:
    """Return the sequences and prefixes that a step of ``sequences`` and ``edits`` touch."""
    return frozenset([*(("sequence", s) for s in sequences), *(t for e in edits for t in _touched_by_edit(e))])


def _touched_by_edit(edit: Edit) -> tuple[tuple[str, int], ...]:
    if isinstance(edit, Drop):
        return (("prefix", edit.prefix),)
    if isinstance(edit, Save | Restore):
        return ("sequence", edit.sequence), ("prefix", edit.prefix)
    return (("sequence", edit.sequence),)


def _is_prefill(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is Compute.PREFILL and frame.error is None


def _is_urgent(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is not Compute.PREFILL
