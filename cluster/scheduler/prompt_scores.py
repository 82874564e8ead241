"""Decides which prefill frames report log-probabilities of the prompt, and accounts for what they report.

A prompt token's log-probability comes from the step of the token before it. So a request that wants them starts from no
kept prefix. After a recovery, only those that the reader does not have yet are reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame, PromptScoring
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.in_flight import InFlightFrame
from cluster.scheduler.outcome import PromptScored
from cluster.scheduler.sequence import ScheduledSequence


def longest_chunk(sequence: ScheduledSequence, capacity: Capacity) -> int:
    """Return the most tokens of a sequence's next chunk. The logits of one that is reported must fit in memory."""
    return capacity.scored_chunk if sequence.unscored else sequence.unsent


def scoring_of(sequence: ScheduledSequence, start: int, count: int) -> PromptScoring | None:
    """Return what a prefill step of tokens ``start`` to ``start + count`` must report; None for nothing."""
    top, prompt = sequence.request.prompt_logprobs, sequence.request.prompt
    first = max(start + 1, sequence.scored)
    targets = prompt[first : start + count + 1]
    return PromptScoring(first - start - 1, targets, top) if top is not None and targets else None


def account_scores(flight: InFlightFrame, live: Iterable[ScheduledSequence], frame: Frame) -> tuple[PromptScored, ...]:
    """Return what a frame reports of the prompt of its sequence, if that is among ``live``.

    ``prefilled`` of the sequence includes the frame. Raise ``BadFrame`` for a frame that reports something else than
    its step asked for.
    """
    scoring, found = flight.scoring, frame.prompt_logprobs
    if frame.error or (scoring is None and found is None):
        return ()
    if scoring is None or found is None or len(found.logprobs) != len(scoring.targets):
        count = len(found.logprobs) if found else 0
        raise BadFrame(f"invalid frame {frame.number} of epoch {frame.epoch}: {count} log-probabilities of its prompt")
    events = []
    for sequence in (s for s in live if s.id in flight.sequences):  # not one that has to start again
        start = sequence.prefilled - flight.prefills + scoring.skip + 1
        if found.start != start:
            raise BadFrame(f"frame {frame.number} reports prompt token {found.start}; it should begin at {start}")
        sequence.scored = start + len(found.logprobs)
        events.append(PromptScored(sequence.request.id, found))
    return tuple(events)
