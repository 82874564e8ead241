"""Sends guesses of a sequence's next tokens behind its certain frame, and verifies them one by one.

A sample that equals the guess behind it makes that guess's frame the certain one. Any other sample drops that guess and
all behind it: the sequence's next step trims them from the stages. So whatever is guessed, tokens are those without
guesses.

Only a sequence that decodes alone in its lane is guessed, and only while no prompt is read. The lanes share the stages:
with as many lanes as stages there is no guess, and a guess goes out only where it delays no other lane.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from cluster.core.frames import Compute, Frame, Join, Sample, Step
from cluster.core.request import Request
from cluster.scheduler.acceptance import Acceptance
from cluster.scheduler.frame_writer import FrameWriter
from cluster.scheduler.guessing import Guess, Guesser, GuessSource
from cluster.scheduler.in_flight import InFlightFrame
from cluster.scheduler.sequence import ChainLink, ScheduledSequence
from cluster.scheduler.speculation import LapMeter, choose_window
from cluster.scheduler.speculation_counts import SpeculationCounts

MarkRoom = Callable[[ScheduledSequence, int], bool]
"""Returns whether there is memory for that many marks of a sequence."""


class GuessChains:
    """The guesses of all sequences. ``guesser`` None guesses nothing. ``eos`` are the tokens that end an answer."""

    def __init__(self, guesser: Guesser | None, eos: frozenset[int]) -> None:
        self._guesser, self._eos = guesser, eos
        self._acceptance = Acceptance()
        self._left: list[tuple[Request, tuple[int, ...] | None]] = []
        """Requests that left, each with its tokens if its answer is worth learning. They wait for ``write``."""
        self.counts = SpeculationCounts()

    def begin_epoch(self, stages: int, writer: FrameWriter, has_mark_room: MarkRoom) -> None:
        """Use the stages and frames of a new epoch."""
        self._stages, self._writer, self._has_mark_room = stages, writer, has_mark_room
        self._meter = LapMeter(stages)

    # Frames that came back

    def receive(
        self, flight: InFlightFrame, sequences: list[ScheduledSequence], frame: Frame, now: float | None
    ) -> list[ScheduledSequence]:
        """Take a decode frame that came back off its sequences' chains. Return those whose state it has advanced.

        The others had dropped it as a wrong guess, or the stages have skipped it. ``now`` is when it came back.
        """
        advanced = []
        for sequence in sequences:
            if not sequence.chain or sequence.chain[0].number != flight.number:
                continue
            if frame.void:  # no stage skips a right guess today; if one does, its token is fed again
                sequence.next_token = sequence.chain[0].token
                self._drop(sequence, 0)
                continue
            sequence.chain.pop(0)
            advanced.append(sequence)
        if flight.guessed and not advanced:
            self.counts.waste(frame.timings)
        elif advanced and len(flight.sequences) == 1:
            lap_s = None if now is None or flight.guessed else now - flight.sent_at
            self._meter.learn(frame.timings, lap_s)
        return advanced

    def join(self, sequence: ScheduledSequence) -> Join:
        """Return the edit that starts a sequence. If it is guessed, samples report what its grammar forces."""
        request = sequence.request
        guessed = self._guesser is not None and request.speculate and request.sampling.grammar is not None
        return Join(sequence.id, len(request.prompt), request.sampling, look_ahead=guessed)

    def verify(self, sequence: ScheduledSequence, sample: Sample) -> tuple[GuessSource | None, GuessSource | None]:
        """Compare a sample with the guess behind it. Return the sources of a right one and of a wrong one, if any."""
        sequence.sampled = True
        if sample.forced and self._guesser:
            self._guesser.hint(sequence.request, sample.position + 1, sample.forced)
        untried, sequence.untried = sequence.untried, None
        link = sequence.chain[0] if sequence.chain else None
        if link is None or link.source is None:
            if untried:
                self._learn(sequence, untried.source, right=untried.tokens[0] == sample.token)
            return None, None
        right = link.token == sample.token
        self._learn(sequence, link.source, right=right)
        if right:
            self.counts.of(link.source).accepted += 1
            return link.source, None
        self._drop(sequence, 0)
        return None, link.source

    def _learn(self, sequence: ScheduledSequence, source: GuessSource, *, right: bool) -> None:
        self._acceptance.learn(sequence.acceptance, source, right=right)
        if self._guesser:
            self._guesser.learn(sequence.request, source, int(right), int(not right))

    # Guesses that are dropped

    def drop_unverified(self, sequence: ScheduledSequence) -> None:
        """Drop every guess of a sequence that its next sample could still confirm."""
        self._drop(sequence, 1)

    def drop_all(self, sequence: ScheduledSequence) -> None:
        """Drop every guess of a sequence whose last sample has come."""
        self._drop(sequence, 0)

    def _drop(self, sequence: ScheduledSequence, kept: int) -> None:
        for link in sequence.drop_guesses(kept):
            if link.source:
                self.counts.of(link.source).voided += 1

    def forget_client(self, client: str) -> None:
        """Drop what is kept of a client's answers."""
        if self._guesser:
            self._report_left(self._guesser)
            self._guesser.forget_client(client)

    def leave(self, sequence: ScheduledSequence, *, learn: bool) -> None:
        """Note that a request left. ``learn``: its answer is worth learning."""
        if self._guesser:
            request = sequence.request
            tokens = (*request.prompt, *sequence.answer) if learn and sequence.answer else None
            self._left.append((request, tokens))

    # Frames to write

    def write(self, lanes: Collection[list[ScheduledSequence]], now: float, *, busy: bool) -> list[Frame]:
        """Write the guesses that can be sent now. ``lanes`` are the members of those lanes that decode.

        Call it after the other frames have been sent: to guess takes time. ``busy``: a prompt is being read.
        """
        if self._guesser is None:
            return []
        self._report_left(self._guesser)
        if busy or not lanes:
            return []
        times = self._meter.times
        share = (times.slots if times and len(lanes) > 1 else self._stages) // len(lanes)
        for members in lanes:
            if share < 2 or len(members) > 1:
                for sequence in members:
                    sequence.window = 1
        alone = [members[0] for members in lanes if len(members) == 1]
        frames: list[Frame] = []
        for sequence in alone:
            for token, source in self._choose(sequence, share, self._guesser):
                if len(lanes) > 1 and self._would_delay_others(lanes, now):
                    break
                frames.append(self._send(sequence, token, source, now))
        return frames

    def _would_delay_others(self, lanes: Collection[list[ScheduledSequence]], now: float) -> bool:
        """Return whether a certain frame may come to a stage that computes a guess which is sent now.

        A lane's next certain frame follows its first frame in flight. The guess is sent once that one is back.
        """
        times = self._meter.times
        if times is None:
            return False
        slowest = max(times.stages)
        free = 0.0
        for sent in self._writer.flights.decodes_sent_at():
            free = max(free, sent) + slowest
        ends = max(free, now) + slowest
        heads = (s.chain[0].number for members in lanes for s in members if s.chain)
        return any(self._writer.flights.sent_at(head) + times.lap < ends for head in heads)

    def _report_left(self, guesser: Guesser) -> None:
        for request, tokens in self._left:
            if tokens and request.speculate:
                guesser.observe(request, tokens)
            guesser.forget(request)
        self._left.clear()

    def _choose(self, sequence: ScheduledSequence, share: int, guesser: Guesser) -> list[tuple[int, GuessSource]]:
        """Choose guesses for a sequence until ``share`` frames of it are in flight, or no more are worth it."""
        request = sequence.request
        count = min(share, request.max_tokens - sequence.produced) - len(sequence.chain)
        if count < 1 or not sequence.chain or not sequence.sampled or sequence.untried or not request.speculate:
            return []
        guess = guesser.propose(request, sequence.fed, count)
        if guess is None or not (tokens := self._sendable(sequence, guess)[:count]):
            return []
        window = self._window(sequence, guess.source, share)
        if window > 1 and not self._reserve_marks(sequence, window):
            self.counts.without_room += 1
            window = 1
        sequence.window = window
        if window == 1 and len(sequence.chain) == 1:
            sequence.untried = guess
        return [(token, guess.source) for token in tokens[: window - len(sequence.chain)]]

    def _sendable(self, sequence: ScheduledSequence, guess: Guess) -> tuple[int, ...]:
        """Return the guessed tokens before one that ends the answer: nothing follows that."""
        if sequence.request.ignore_eos:
            return guess.tokens
        ends = (i for i, token in enumerate(guess.tokens) if token in self._eos)
        return guess.tokens[: next(ends, len(guess.tokens))]

    def _window(self, sequence: ScheduledSequence, source: GuessSource, share: int) -> int:
        times = self._meter.times
        if times is None:
            return 1
        return choose_window(times, self._acceptance.estimate(sequence.acceptance, source), share)

    def _reserve_marks(self, sequence: ScheduledSequence, window: int) -> bool:
        """Reserve memory for the marks that stages take before guesses. Return False if there is none."""
        if sequence.guess_marks < window:
            if not self._has_mark_room(sequence, window):
                return False
            sequence.guess_marks = window
        return True

    def _send(self, sequence: ScheduledSequence, token: int, source: GuessSource, now: float) -> Frame:
        start = len(sequence.fed)
        step = Step(Compute.DECODE, (sequence.id,), ((token,),), guesses=len(sequence.chain), start=start)
        frame = self._writer.write(sequence.lane, step, 0, now)
        sequence.fed.append(token)
        sequence.chain.append(ChainLink(frame.number, start, token, source))
        self.counts.of(source).guessed += 1
        return frame
