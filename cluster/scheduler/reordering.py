"""Chooses the next frame to run on a stage. A decode frame may overtake waiting prefill frames.

Frames that touch different sequences and different kept prefixes commute: a stage may run them in either order and
ends in the same state. A decode frame takes a few milliseconds and a client is waiting for its token; a prefill frame
takes much longer. So decode frames go first, but each lane may overtake a prefill frame only once. A next token waits
for at most one chunk per stage, and no prompt starves behind lanes that decode without pause.

A frame of guesses may be of no use, so it lets those of others go first: each lane's decode frame once, and one of the
rest. It never overtakes. A waiting one becomes void once a later frame trims its guesses away. That only saves time:
the state after the trim is the same, whichever stages have computed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Drop, Edit, Frame, Persist, Restore, Save, Trim
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
        self._void_trimmed(frame)
        self._waiting.append(_WaitingFrame(frame, ready, find_touched(frame)))

    def _void_trimmed(self, frame: Frame) -> None:
        """Make waiting frames void whose tokens are guesses that ``frame`` trims away."""
        if not any(isinstance(edit, Trim) for edit in frame.edits):
            return
        lengths: dict[int, int] = {}
        for edit in frame.edits:
            if isinstance(edit, Trim):
                lengths[edit.sequence] = min(edit.length, lengths.get(edit.sequence, edit.length))
        for waiting in self._waiting:
            if (start := guess_start(waiting.frame)) is not None and waiting.frame.step:
                length = lengths.get(waiting.frame.step.sequences[0])
                if length is not None and length <= start:
                    waiting.frame = replace(waiting.frame, void=True, tensors=())

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
        yields = _is_prefill(head.frame) or not _is_certain(head.frame)
        if yields and (overtaking := self._find_overtaking(head)):
            if head.ready:  # overtaking a head without tensors delays nothing, so it uses up no turn
                self._overtook.add(_turn(overtaking.frame))
            return self._take_out(overtaking)
        if not head.ready:
            return None
        if yields:
            self._overtook.clear()
        return self._take_out(head)

    def _take_out(self, waiting: _WaitingFrame) -> Frame:
        self._waiting.remove(waiting)
        return waiting.frame

    def _find_overtaking(self, head: _WaitingFrame) -> _WaitingFrame | None:
        """Return the first frame that commutes with all frames before it and may still overtake ``head``.

        Only a decode frame overtakes a prefill frame; any overtakes guesses but other guesses. Its turn must not be
        spent on ``head`` yet, if ``head`` is ready to run.
        """
        spent = self._overtook if head.ready else frozenset()
        may_go = _is_urgent if _is_prefill(head.frame) else _is_certain
        before: set[tuple[str, int]] = set()
        for waiting in self._waiting:
            eligible = waiting.ready and may_go(waiting.frame) and _turn(waiting.frame) not in spent
            if eligible and before.isdisjoint(waiting.touched):
                return waiting
            before |= waiting.touched
        return None


def find_touched(frame: Frame) -> Touched:
    """Return the sequences and prefixes whose state a frame reads or changes."""
    rows = frame.step.sequences if frame.step else ()
    return find_touched_by(rows, frame.edits)


def find_touched_by(sequences: Iterable[int], edits: Iterable[Edit]) -> Touched:
    """Return the sequences and prefixes that a step of ``sequences`` and ``edits`` touch."""
    return frozenset([*(("sequence", s) for s in sequences), *(t for e in edits for t in _find_touched_by_edit(e))])


def _find_touched_by_edit(edit: Edit) -> tuple[tuple[str, int], ...]:
    if isinstance(edit, Drop | Persist):
        return (("prefix", edit.prefix),)
    if isinstance(edit, Save | Restore):
        return ("sequence", edit.sequence), ("prefix", edit.prefix)
    return (("sequence", edit.sequence),)


def _is_prefill(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is Compute.PREFILL and frame.error is None


def _is_urgent(frame: Frame) -> bool:
    return frame.step is not None and frame.step.compute is not Compute.PREFILL and _is_certain(frame)


def _is_certain(frame: Frame) -> bool:
    return guess_start(frame) is None


def guess_start(frame: Frame) -> int | None:
    """Return where the tokens of a frame start if all of them are guesses that may still be computed; else None."""
    step = frame.step
    return step.start if step and step.guessed and not frame.void and frame.error is None else None


def _turn(frame: Frame) -> int:
    """Return whose turn a frame uses up when it overtakes: its lane's, or -1, which all but decode frames share."""
    return frame.lane if _is_urgent(frame) else -1
