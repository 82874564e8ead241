"""Tracks the frames that are in the ring. It knows which frames may overtake which, so it detects a lost frame."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, PromptScoring
from cluster.scheduler.reordering import Touched
from cluster.scheduler.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class InFlightFrame:
    """A frame in the ring: its compute, its sequences, the number of prompt tokens it prefills, and what it touches.

    ``guessed``: its token was a guess when it was written, so frames of other sequences may overtake it.

    ``sampled``: the most samples of a sequence that it returns.

    ``compute`` is None for an edit-only frame. ``sent_at`` is in seconds of the injected clock. ``scoring`` is what it
    reports of the prompt.
    """

    number: int
    lane: int
    compute: Compute | None
    sequences: tuple[int, ...]
    prefills: int
    sent_at: float
    touched: Touched = frozenset()
    scoring: PromptScoring | None = None
    guessed: bool = False
    sampled: int = 1


class InFlightFrames:
    """The frames of one epoch that are in the ring, in the order in which they were written."""

    def __init__(self) -> None:
        self._frames: dict[int, InFlightFrame] = {}
        self._leaving: dict[int, ScheduledSequence] = {}
        """Sequences that have ended but still have a frame in the ring, so their rows and caches are still in use."""

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def prefills(self) -> int:
        """The number of prefill frames in the ring."""
        return sum(f.compute is Compute.PREFILL for f in self._frames.values())

    def oldest(self) -> tuple[float, int] | None:
        """Return when the oldest frame in the ring was written and how many tokens it prefills; None if empty."""
        return next(((f.sent_at, f.prefills) for f in self._frames.values()), None)

    def sent_at(self, number: int) -> float:
        """Return when a frame that is in the ring was written."""
        return self._frames[number].sent_at

    def decodes_sent_at(self) -> list[float]:
        """Return when the decode frames in the ring were written, the oldest first."""
        return [f.sent_at for f in self._frames.values() if f.compute is Compute.DECODE]

    @property
    def has_edits_only(self) -> bool:
        """Whether an edit-only frame is in the ring."""
        return any(f.compute is None for f in self._frames.values())

    def touches(self, touched: Touched) -> bool:
        """Return whether a frame in the ring touches any of these."""
        return any(not touched.isdisjoint(f.touched) for f in self._frames.values())

    def touches_before(self, sequence: int, number: int) -> bool:
        """Return whether a frame in the ring that was written before frame ``number`` touches the sequence."""
        return any(f.number < number and ("sequence", sequence) in f.touched for f in self._frames.values())

    def defer_leave(self, sequence: ScheduledSequence) -> bool:
        """Return whether a frame in the ring touches the sequence. If so, ``take_departed`` returns it later."""
        if in_ring := self.touches(frozenset([("sequence", sequence.id)])):
            self._leaving[sequence.id] = sequence
        return in_ring

    @property
    def leaving(self) -> tuple[ScheduledSequence, ...]:
        """Sequences that have ended but still have a frame in the ring."""
        return tuple(self._leaving.values())

    def take_departed(self) -> list[ScheduledSequence]:
        """Remove and return the sequences in ``leaving`` whose last frame has come back."""
        back = [s for s in self._leaving.values() if not self.touches(frozenset([("sequence", s.id)]))]
        for sequence in back:
            del self._leaving[sequence.id]
        return back

    def add(self, flight: InFlightFrame) -> None:
        self._frames[flight.number] = flight

    def receive(self, frame: Frame) -> InFlightFrame:
        """Remove and return the record of a frame that came back.

        Raise ``BadFrame`` if the frame is not in the ring, answers a sequence twice, or shows that another was lost.
        """
        if frame.number not in self._frames:
            raise BadFrame(f"unexpected frame {frame.number} of epoch {frame.epoch}: it is not in the ring")
        flight = self._frames.pop(frame.number)
        failed = [f.sequence for f in frame.failures]
        answers = Counter([*(s.sequence for s in frame.samples), *failed])
        most = dict.fromkeys(flight.sequences, flight.sampled)
        if len(set(failed)) < len(failed) or any(n > most.get(sequence, 1) for sequence, n in answers.items()):
            raise BadFrame(f"invalid frame {frame.number} of epoch {frame.epoch}: too many answers for one sequence")
        self._require_none_lost(flight)
        return flight

    def _require_none_lost(self, back: InFlightFrame) -> None:
        """Raise ``BadFrame`` if an older frame is still in the ring that ``back`` could not have overtaken.

        ``cluster.scheduler.reordering`` defines which frames may overtake which.
        """
        behind_prefill = behind_guess = False
        for older in self._frames.values():
            if older.number > back.number:
                return
            prefill = older.compute is Compute.PREFILL
            behind_prefill = behind_prefill or prefill
            behind_guess = behind_guess or older.guessed
            same = not set(older.sequences).isdisjoint(back.sequences)
            overtaken = behind_guess or (behind_prefill and not (prefill and back.compute is Compute.PREFILL))
            if same or not overtaken:
                raise BadFrame(f"frame {older.number} was lost: frame {back.number} came back before it")
