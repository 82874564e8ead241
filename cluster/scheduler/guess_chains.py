"""Sends guesses of a sequence's next tokens behind its certain token, and verifies them one by one.

Where frames of several tokens are known to be cheap, a frame feeds several. Then guesses follow the certain token in
its frame, and others follow in frames of their own.

A sample that equals the guess behind it makes that guess's frame the certain one. Any other sample drops that guess and
all behind it: the sequence's next step trims them from the stages. So whatever is guessed, tokens are those without
guesses.

Only a sequence that decodes alone in its lane is guessed, and only while no prompt is read. The lanes share the stages:
with as many lanes as stages there is no guess, and a guess goes out only where it delays no other lane.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Join, Sample, Step
from cluster.core.request import Request
from cluster.scheduler.acceptance_rates import AcceptanceRates
from cluster.scheduler.frame_writer import FrameWriter
from cluster.scheduler.guess_window import LapMeter, choose_window
from cluster.scheduler.guessing import Guess, Guesser, GuessSource
from cluster.scheduler.in_flight import InFlightFrame
from cluster.scheduler.sequence import ChainLink, ScheduledSequence
from cluster.scheduler.speculation_counts import SpeculationCounts
from cluster.scheduler.verify_length import Depth, choose_depth

MarkRoom = Callable[[ScheduledSequence, int], bool]
"""Returns whether there is memory for that many marks of a sequence."""


class GuessChains:
    """The guesses of all sequences. ``guesser`` None guesses nothing. ``eos`` are the tokens that end an answer."""

    def __init__(self, guesser: Guesser | None, eos: frozenset[int]) -> None:
        self._guesser, self._eos = guesser, eos
        self._acceptance = AcceptanceRates()
        self._left: list[tuple[Request, tuple[int, ...] | None]] = []
        """Requests that left, each with its tokens if its answer is worth learning. They wait for ``write``."""
        self.counts = SpeculationCounts()

    def begin_epoch(
        self,
        stages: int,
        writer: FrameWriter,
        has_mark_room: MarkRoom,
        verify_costs: Mapping[int, Sequence[float]],
    ) -> None:
        """Use the stages and frames of a new epoch. ``verify_costs`` are those of its capacity."""
        self._stages, self._writer, self._has_mark_room = stages, writer, has_mark_room
        self._lengths = (1, *sorted(verify_costs))
        self._meter = LapMeter(stages, verify_costs)

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
            head = sequence.chain[0]
            if frame.void:  # no stage skips a right guess today; if one does, its token is fed again
                sequence.next_token = head.tokens[0]
                self.drop_all(sequence)
                continue
            if len(head.tokens) > 1:
                self._account_row(sequence, head, frame)
            rest = head.behind_first()
            sequence.chain[:1] = [rest._replace(back=True)] if rest else []
            advanced.append(sequence)
        if flight.guessed and not advanced:
            self.counts.waste(frame.timings)
        elif advanced and len(flight.sequences) == 1:
            lap_s = None if now is None or flight.guessed else now - flight.sent_at
            self._meter.learn(frame.timings, lap_s, flight.sampled)
        return advanced

    def _account_row(self, sequence: ScheduledSequence, head: ChainLink, frame: Frame) -> None:
        """Raise ``BadFrame`` unless a row was sampled just up to its first wrong guess. Count what it wasted."""
        samples = [sample for sample in frame.samples if sample.sequence == sequence.id]
        pairs = zip(samples, head.tokens[1:], strict=False)
        stops = (i for i, (sample, token) in enumerate(pairs) if sample.final or sample.token != token)
        right = next(stops, min(len(samples), len(head.tokens) - 1))
        failed = any(failure.sequence == sequence.id for failure in frame.failures)
        if len(samples) != right + (not failed):
            raise BadFrame(
                f"invalid frame {frame.number} of epoch {frame.epoch}: {len(samples)} samples of a row of "
                f"{len(head.tokens)} tokens, of which {right} guesses are right"
            )
        self.counts.waste(frame.timings, 1 - (right + 1) / len(head.tokens))

    def join(self, sequence: ScheduledSequence) -> Join:
        """Return the edit that starts a sequence. If it is guessed, samples report what its grammar forces."""
        request = sequence.request
        guessed = self._guesser is not None and request.speculate and request.sampling.grammar is not None
        return Join(
            sequence.id,
            len(request.prompt),
            request.sampling,
            look_ahead=guessed,
            adapter=request.adapter,
            embeds=request.embeds,
        )

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
        right = link.tokens[0] == sample.token
        self._learn(sequence, link.source, right=right)
        if not right:
            self.drop_all(sequence)
            return None, link.source
        self.counts.of(link.source).accepted += 1
        if link.back:
            rest = link.behind_first()
            sequence.chain[:1] = [rest] if rest else []
        return link.source, None

    def _learn(self, sequence: ScheduledSequence, source: GuessSource, *, right: bool) -> None:
        self._acceptance.learn(sequence.acceptance, source, right=right)
        if self._guesser:
            self._guesser.learn(sequence.request, source, int(right), int(not right))

    # Guesses that are dropped

    def drop_frames(self, sequence: ScheduledSequence) -> None:
        """Drop the frames of guesses that its next samples could still confirm."""
        self._count_dropped(sequence.drop_links(1))

    def drop_unverified(self, sequence: ScheduledSequence) -> None:
        """Drop every guess of a sequence that its next samples could still confirm."""
        self._count_dropped(sequence.drop_guesses())

    def drop_all(self, sequence: ScheduledSequence) -> None:
        """Drop every guess of a sequence whose last sample has come."""
        self._count_dropped(sequence.drop_links(0))

    def _count_dropped(self, links: Sequence[ChainLink]) -> None:
        for link in links:
            if link.source:
                self.counts.of(link.source).voided += len(link.tokens)

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
            for tokens, source in self._choose(sequence, share, self._guesser, rows=len(lanes) == 1):
                if len(lanes) > 1 and self._would_delay_others(lanes, now):
                    break
                frames.append(self._send(sequence, tokens, source, now))
        return frames

    def extend_head(
        self, sequence: ScheduledSequence, lanes: Collection[list[ScheduledSequence]], *, busy: bool
    ) -> None:
        """Add guesses to the frame that is about to feed a sequence's next token, if such rows are cheap.

        Only a sequence that decodes alone gets them. The frame waits for the guesser then.
        """
        alone = [member for members in lanes for member in members] == [sequence]
        if self._guesser is None or len(self._lengths) == 1 or busy or not alone:
            return
        guess = self._propose(sequence, self._guesser, self._lengths[-1] - 1)
        if guess is None or not sequence.sampled:
            return
        depth = self._depth(sequence, guess.source, self._stages, 1 + len(guess.tokens))
        if tokens := guess.tokens[: depth.tokens - 1]:
            sequence.feed_row(tokens, guess.source)
            self._count_sent(guess.source, tokens, rows=len(tokens))

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

    def _choose(
        self, sequence: ScheduledSequence, share: int, guesser: Guesser, *, rows: bool
    ) -> list[tuple[tuple[int, ...], GuessSource]]:
        """Choose guesses for a sequence until ``share`` frames of it are in flight, or no more are worth it.

        Return the tokens of each frame, several only with ``rows``.
        """
        if not sequence.chain or not sequence.sampled or sequence.untried:
            return []
        room = share - len(sequence.chain)
        compares = len(sequence.chain) == 1 and len(sequence.chain[0].tokens) == 1
        longest = self._lengths[-1] if rows else 1
        if room < 1 and (longest == 1 or not compares):
            return []
        guess = self._propose(sequence, guesser, max(room, 1) * longest)
        if guess is None:
            return []
        depth = self._depth(sequence, guess.source, share, len(guess.tokens) if rows else 1)
        if depth.window > 1 and not self._reserve_marks(sequence, depth.window):
            self.counts.without_room += 1
            depth = Depth()
        sequence.window = depth.window
        if depth.window == 1 and compares:
            sequence.untried = guess
        pieces = self._cut(guess.tokens, depth.tokens)
        return [(tokens, guess.source) for tokens in pieces[: max(depth.window - len(sequence.chain), 0)]]

    def _propose(self, sequence: ScheduledSequence, guesser: Guesser, count: int) -> Guess | None:
        """Return a guess of up to ``count`` tokens that may be sent: none past the end of the answer."""
        request = sequence.request
        in_flight = sum(len(link.tokens) for link in sequence.chain)
        count = min(count, request.max_tokens - sequence.produced - in_flight)
        if count < 1 or not request.speculate:
            return None
        guess = guesser.propose(request, sequence.fed, count)
        tokens = self._sendable(sequence, guess)[:count] if guess else ()
        return Guess(tokens, guess.source) if guess and tokens else None

    def _sendable(self, sequence: ScheduledSequence, guess: Guess) -> tuple[int, ...]:
        """Return the guessed tokens before one that ends the answer: nothing follows that."""
        if sequence.request.ignore_eos:
            return guess.tokens
        ends = (i for i, token in enumerate(guess.tokens) if token in self._eos)
        return guess.tokens[: next(ends, len(guess.tokens))]

    def _depth(self, sequence: ScheduledSequence, source: GuessSource, share: int, tokens: int) -> Depth:
        """Return how many frames may be in flight, at most ``share``, and their length, at most ``tokens``."""
        times, right = self._meter.times, self._acceptance.estimate(sequence.acceptance, source)
        if times is None:
            return Depth()
        if tokens == 1 or len(self._lengths) == 1:
            return Depth(choose_window(times, right, share))
        return choose_depth({n: step for n, step in self._meter.steps().items() if n <= tokens}, right, share)

    def _cut(self, tokens: tuple[int, ...], length: int) -> list[tuple[int, ...]]:
        """Cut guesses into pieces for frames of ``length`` tokens. Only lengths of known cost are used."""
        pieces = []
        while tokens:
            size = max(n for n in self._lengths if n <= min(length, len(tokens)))
            pieces.append(tokens[:size])
            tokens = tokens[size:]
        return pieces

    def _reserve_marks(self, sequence: ScheduledSequence, window: int) -> bool:
        """Reserve memory for the marks that stages take before guesses. Return False if there is none."""
        if sequence.guess_marks < window:
            if not self._has_mark_room(sequence, window):
                return False
            sequence.guess_marks = window
        return True

    def _send(self, sequence: ScheduledSequence, tokens: tuple[int, ...], source: GuessSource, now: float) -> Frame:
        start = len(sequence.fed)
        guesses = start + len(tokens) - sequence.certain_length
        step = Step(Compute.DECODE, (sequence.id,), (tokens,), guesses=guesses, start=start)
        frame = self._writer.write(sequence.lane, step, 0, now)
        sequence.fed.extend(tokens)
        sequence.chain.append(ChainLink(frame.number, start, tokens, source))
        self._count_sent(source, tokens, rows=len(tokens) - 1)
        return frame

    def _count_sent(self, source: GuessSource, tokens: tuple[int, ...], *, rows: int) -> None:
        counts = self.counts.of(source)
        counts.guessed += len(tokens)
        counts.rows += rows
