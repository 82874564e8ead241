"""Whose turn it is on a stage: a decode frame may overtake prefill frames that are waiting.

Frames that touch different sequences and different kept prefixes commute, so a stage may run them in either order
and hold the same state afterwards. A decode frame takes a few milliseconds and somebody is waiting for its token; a
prefill frame takes many. So a decode frame goes first, once a lane for each prefill frame: nobody's next token waits
for more than one chunk a stage, and no prompt starves behind lanes that never pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Drop, Edit, Frame, Restore, Save
from cluster.core.limits import MAX_FRAMES_WAITING

Touched = frozenset[tuple[str, int]]
"""Sequences and kept prefixes, by kind and id."""


@dataclass(slots=True)
class _WaitingFrame:
    frame: Frame
    ready: bool
    touched: Touched


class ReorderBuffer:
    """The frames that wait on one stage, in the order in which they arrived."""

    def __init__(self) -> None:
        self._waiting: list[_WaitingFrame] = []
        self._overtook: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Frame]:
        return (w.frame for w in self._waiting)

    def add(self, frame: Frame, *, ready: bool) -> None:
        """A frame arrived; one that is not ``ready`` lacks its tensors. Raises ``BadFrame`` where too many wait."""
        if len(self._waiting) >= MAX_FRAMES_WAITING:
            raise BadFrame(f"{len(self._waiting)} frames wait on one stage")
        self._waiting.append(_WaitingFrame(frame, ready, touched(frame)))

    def lacking(self, number: int) -> Frame | None:
        """The waiting frame of that number that lacks its tensors, if there is one."""
        return next((w.frame for w in self._waiting if w.frame.number == number and not w.ready), None)

    def complete(self, frame: Frame) -> None:
        """The tensors of a waiting frame arrived; here it is whole."""
        for waiting in self._waiting:
            if waiting.frame.number == frame.number:
                waiting.frame, waiting.ready = frame, True

    def take(self) -> Frame | None:
        """The frame to run next, which waits no more; None where none can run yet."""
        if not self._waiting:
            return None
        head = self._waiting[0]
        if _prefills(head.frame) and (passing := self._find_overtaking(head)):
            if head.ready:  # a head that could not run was not kept waiting
                self._overtook.add(passing.frame.lane)
            return self._take_out(passing)
        if not head.ready:
            return None
        if _prefills(head.frame):
            self._overtook.clear()
        return self._take_out(head)

    def _take_out(self, waiting: _WaitingFrame) -> Frame:
        self._waiting.remove(waiting)
        return waiting.frame

    def _find_overtaking(self, head: _WaitingFrame) -> _WaitingFrame | None:
        """The first decode frame that commutes with all before it, of a lane that has not overtaken ``head`` yet."""
        spent = self._overtook if head.ready else frozenset()
        before: set[tuple[str, int]] = set()
        for waiting in self._waiting:
            may = waiting.ready and _decodes(waiting.frame) and waiting.frame.lane not in spent
            if may and before.isdisjoint(waiting.touched):
                return waiting
            before |= waiting.touched
        return None


def touched(frame: Frame) -> Touched:
    """Everything whose state a frame reads or changes."""
    rows = frame.step.sequences if frame.step else ()
    return touched_by(rows, frame.edits)


def touched_by(sequences: Iterable[int], edits: Iterable[Edit]) -> Touched:
    """What a step of ``sequences`` and these edits touch."""
    return frozenset([*(("sequence", s) for s in sequences), *(t for e in edits for t in _of_edit(e))])


def _of_edit(edit: Edit) -> tuple[tuple[str, int], ...]:
    if isinstance(edit, Drop):
        return (("prefix", edit.prefix),)
    if isinstance(edit, Save | Restore):
        return ("sequence", edit.sequence), ("prefix", edit.prefix)
    return (("sequence", edit.sequence),)


def _prefills(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is Compute.PREFILL and frame.error is None


def _decodes(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is not Compute.PREFILL
