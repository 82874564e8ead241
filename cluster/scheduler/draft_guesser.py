"""Guesses an answer with a draft model, which runs whole on one stage: a ring of its own.

A frame to that ring brings the tokens that the stage lacks, and asks for several guesses at once. The stage feeds each
of its guesses back. While they are used up, the next ones are asked for, so that they are there before the target needs
them. A draft that turned out wrong is trimmed away by the next frame.

The stage draws with the target's seeds and noise, so where the models agree, so do their draws. It knows nothing of
grammars. It holds a bounded number of tokens: a request for which there is no room gets no drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Final

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Edit, Frame, Join, Leave, Step, Trim
from cluster.core.limits import DRAFT_AHEAD, MAX_DRAFTS
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.radix import shared_length

_IN_FLIGHT: Final = 64
"""Tokens at the end of a sequence that may have been replaced since it was last seen. No chain of guesses is longer."""


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What a draft model can do.

    ``vocabulary`` counts its tokens, ``target_vocabulary`` those of the model that it guesses for. ``capacity`` is the
    number of tokens that its stage can hold, ``chunk`` the number that a prefill frame may have.
    """

    epoch: int
    vocabulary: int
    target_vocabulary: int
    max_context: int
    capacity: int
    chunk: int


@dataclass(slots=True)
class _DraftedSequence:
    """A sequence on the draft's stage. ``held`` are the tokens there.

    ``tokens`` are those that it guessed last, the first of them for position ``start``. ``asked``: a frame is in the
    ring. ``seen`` is the length of the target's sequence when it was last asked for.
    """

    id: int
    reserved: int
    held: list[int] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    start: int = 0
    asked: bool = False
    seen: int = 0


class DraftGuesser:
    """Guesses the tokens of all requests with one draft model. ``send`` sends a frame to its ring."""

    def __init__(self, model: DraftModel, send: Callable[[Frame], None]) -> None:
        self._model, self._send = model, send
        self._drafted: dict[str, _DraftedSequence] = {}
        self._by_id: dict[int, _DraftedSequence] = {}
        self._numbers = self._sequences = self._reserved = 0
        self._closed = True

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Guess | None:
        """Guess at most ``count`` tokens after ``tokens``, from those that were drafted before. Ask for more."""
        drafted = self._drafted.get(request.id) or self._begin(request)
        if drafted is None:
            return None
        known = len(tokens) - drafted.start
        follows = 0 <= known <= len(drafted.tokens) and tuple(tokens[drafted.start :]) == drafted.tokens[:known]
        left = drafted.tokens[known:] if follows else ()
        if not drafted.asked and len(left) < count + DRAFT_AHEAD // 2:
            self._ask(request, drafted, tokens, left, count)
        return Guess(left[:count], GuessSource.DRAFT) if left else None

    def receive(self, frame: Frame) -> bool:
        """Take a frame that came back. Return whether it brought guesses. Raise ``BadFrame`` if it is invalid."""
        if frame.error:
            raise BadFrame(f"the draft model failed: {frame.error.sentence}")
        for failure in frame.failures:
            self._end(failure.sequence)
        samples = [s for s in frame.samples if s.sequence in self._by_id]
        if not samples:
            return False
        drafted = self._by_id[samples[0].sequence]
        first = drafted.start + len(drafted.tokens)
        if [s.position for s in samples] != list(range(first, first + len(samples))):
            raise BadFrame(f"invalid draft frame {frame.number}: its positions are not those requested, {first} and on")
        tokens = [s.token for s in samples]
        drafted.held += tokens[:-1]
        drafted.tokens += tuple(takewhile(lambda token: token < self._model.target_vocabulary, tokens))
        drafted.asked = False
        return True

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None:
        """A draft model does not learn."""

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None:
        """A draft model follows no grammar."""

    def observe(self, request: Request, tokens: Sequence[int]) -> None:
        """A draft model keeps no answers."""

    def forget(self, request: Request) -> None:
        """Let a request's sequence leave the draft's stage."""
        if drafted := self._drafted.pop(request.id, None):
            self._end(drafted.id)

    def forget_client(self, client: str) -> None:
        """A draft model keeps no answers."""

    def open(self, model: DraftModel) -> None:
        """Begin to guess: the ring of ``model`` is there, and its stage holds nothing."""
        self._model, self._closed = model, False
        self._numbers = self._sequences = 0

    def close(self) -> None:
        """Guess nothing any more: the draft's ring is lost."""
        self._closed = True
        self._drafted.clear()
        self._by_id.clear()
        self._reserved = 0

    def _begin(self, request: Request) -> _DraftedSequence | None:
        length = len(request.prompt) + request.max_tokens + MAX_DRAFTS
        if self._closed or length > self._model.max_context or self._reserved + length > self._model.capacity:
            return None
        self._sequences += 1
        drafted = _DraftedSequence(self._sequences, length)
        self._reserved += length
        self._drafted[request.id] = self._by_id[drafted.id] = drafted
        return drafted

    def _end(self, sequence: int) -> None:
        if drafted := self._by_id.pop(sequence, None):
            self._reserved -= drafted.reserved
            self._write((Leave(sequence),), None)

    def _ask(
        self, request: Request, drafted: _DraftedSequence, tokens: Sequence[int], left: tuple[int, ...], count: int
    ) -> None:
        """Bring the stage to the end of ``tokens`` and what is drafted behind them, and ask for more drafts."""
        wanted = [*tokens, *left]
        same = max(min(drafted.seen, len(drafted.held)) - _IN_FLIGHT, 0)
        same += shared_length(drafted.held[same:], wanted[same:])
        kept = min(same, len(wanted) - 1)
        edits: list[Edit] = []
        if not drafted.held and not drafted.seen:
            edits.append(
                Join(drafted.id, len(request.prompt), self._sampling(request), noise=self._model.target_vocabulary)
            )
        elif kept < len(drafted.held):
            edits.append(Trim(drafted.id, kept))
        del drafted.held[kept:]
        new = wanted[kept:]
        for first in range(0, len(new) - 1, self._model.chunk):
            row = tuple(new[first : min(first + self._model.chunk, len(new) - 1)])
            self._write(tuple(edits), Step(Compute.PREFILL, (drafted.id,), (row,)))
            edits = []
        drafts = min(count + DRAFT_AHEAD, MAX_DRAFTS)
        self._write(tuple(edits), Step(Compute.DECODE, (drafted.id,), ((new[-1],),), drafts=drafts))
        drafted.held += new
        drafted.tokens, drafted.start = left, len(tokens)
        drafted.asked, drafted.seen = True, len(tokens)

    def _sampling(self, request: Request) -> SamplingParams:
        """Return how the draft draws: as the target, but without a grammar, and within its own vocabulary."""
        sampling = request.sampling
        bias = tuple((token, value) for token, value in sampling.logit_bias if token < self._model.vocabulary)
        return replace(sampling, logit_bias=bias, logprobs=False, top_logprobs=0, grammar=None)

    def _write(self, edits: tuple[Edit, ...], step: Step | None) -> None:
        if not self._closed:
            self._send(Frame(self._model.epoch, 0, self._numbers, edits, step))
            self._numbers += 1
