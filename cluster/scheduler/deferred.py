"""Tracks the sequences whose first sample waits for the last stage to compile their grammar.

Such a sample comes with the reply to any later frame. While no frame is in the ring, an empty one asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame
from cluster.core.limits import GRAMMAR_POLL_S, GRAMMAR_POLL_SHARE, GRAMMAR_WAIT_S
from cluster.core.request import Grammar
from cluster.scheduler.sequence import ScheduledSequence


class DeferredSamples:
    """The sequences of one epoch that wait for a grammar, and when their decode frames were sent, in seconds."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[float, ScheduledSequence]] = {}
        self._asked_at = -inf

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return (sequence for _, sequence in self._since.values())

    def __contains__(self, sequence: ScheduledSequence) -> bool:
        return sequence.id in self._since

    def add(self, sequence: ScheduledSequence, sent_at: float) -> None:
        """Wait for the sample of a sequence. It goes behind the rows that decode meanwhile."""
        self._since[sequence.id] = sent_at, sequence
        sequence.turn = 0

    def add_unanswered(self, live: list[ScheduledSequence], frame: Frame, sent_at: float) -> None:
        """Wait for the samples of a decode frame's sequences that have no answer: their grammars are being compiled.

        Raise ``BadFrame`` for one that has no grammar.
        """
        answered = {*(s.sequence for s in frame.samples), *(f.sequence for f in frame.failures)}
        for sequence in [s for s in live if s.id not in answered]:
            if sequence.request.sampling.grammar is None:
                raise BadFrame(
                    f"invalid frame {frame.number} of epoch {frame.epoch}: no answer for sequence {sequence.id}"
                )
            self.add(sequence, sent_at)

    def discard(self, sequence: ScheduledSequence) -> None:
        """Stop waiting: the sample has come, or the sequence has ended."""
        if self._since.pop(sequence.id, None):
            self._asked_at = -inf  # more may have been compiled than one frame samples

    def on_written(self, now: float) -> None:
        """Note that a frame was written, whose reply will bring what is ready."""
        self._asked_at = now

    def ask_at(self) -> float:
        """Return when to send the next empty frame, if none is in the ring; infinite if nothing waits.

        The pause grows with the time that the newest sequence has waited, so that frames are few and delays small.
        """
        if not self._since:
            return inf
        waited = self._asked_at - max(at for at, _ in self._since.values())
        return self._asked_at + max(GRAMMAR_POLL_S, GRAMMAR_POLL_SHARE * waited)

    def late_at(self) -> float:
        """Return when the first sequence will have waited for too long; infinite if nothing waits."""
        return min((at for at, _ in self._since.values()), default=inf) + GRAMMAR_WAIT_S

    def late(self, now: float) -> list[tuple[str, Grammar]]:
        """Return the requests that have waited for too long, each with its grammar."""
        late = (sequence.request for at, sequence in self._since.values() if at + GRAMMAR_WAIT_S <= now)
        return [(request.id, request.sampling.grammar) for request in late if request.sampling.grammar]
