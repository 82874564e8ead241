"""Fake stages for the scheduler: they apply every edit, remember each sequence's tokens, and check the rules."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.core.frames import (
    Compute,
    Drop,
    Edit,
    Failure,
    Frame,
    Join,
    Leave,
    Mark,
    Persist,
    Restore,
    Sample,
    Save,
    StageTiming,
    Step,
    Trim,
    Unmark,
)
from cluster.core.request import PromptLogprobs
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.reordering import ReorderBuffer

EOS = 0
MARK_BYTES = (3, 5)
TIMINGS = (StageTiming(0, 0, 1000, 0), StageTiming(1, 0, 1000, 0))


def capacity(
    lanes: int = 1,
    rows: int = 4,
    window: int = 9,
    budget: int = 10_000,
    prefixes: int = 0,
    chunk: int = 4,
    queue: int = 100,
    trimmable: bool = True,
    max_step_ms: float | None = None,
    scored_chunk: int = 100,
    max_chunk: int = 0,
    stages: int = 2,
    verify_costs: Mapping[int, float] | None = None,
) -> Capacity:
    """A token takes 1 byte on the first stage and 2 on each other one, a mark 3 and 5.

    Chunks have at most ``chunk`` tokens, whatever they cost, unless ``max_chunk`` allows more. Rows cost the same on
    every stage.
    """
    weights, marks = (1, *[2] * (stages - 1)), (MARK_BYTES[0], *[MARK_BYTES[1]] * (stages - 1))
    return Capacity(
        lanes=lanes,
        rows=rows,
        window=window,
        budget=tuple(weight * budget for weight in weights),
        prefix_budget=tuple(weight * prefixes for weight in weights),
        cost_of=lambda tokens: tuple(weight * tokens for weight in weights),
        mark_cost_of=None if trimmable else lambda tokens: marks,
        chunk=chunk,
        max_chunk=lambda context: max_chunk or chunk,
        queue=queue,
        max_step_ms=max_step_ms,
        scored_chunk=scored_chunk,
        verify_costs={tokens: (cost,) * stages for tokens, cost in (verify_costs or {}).items()},
    )


class Stages:
    """A ring of them. The token after a history depends on all of it, so that a wrong cache gives a wrong token.

    A sequence with a grammar is ``compiling`` until a test takes it out; its first sample is deferred until then.
    """

    def __init__(self, trimmable: bool = True) -> None:
        self.frames = ReorderBuffer()
        self.fed: dict[int, tuple[int, ...]] = {}
        self.prefixes: dict[int, tuple[int, ...]] = {}
        self.compiling: set[int] = set()
        self.deferred: dict[int, list[Sample]] = {}
        self.persisted: list[Persist] = []
        self._marks: dict[int, dict[int, object]] = {}
        self._kept_marks: dict[int, dict[int, object]] = {}
        self._trimmable = trimmable
        self._numbers = 0
        self._sampled: dict[int, tuple[int, int]] = {}
        self._guess_marks: dict[int, set[int]] = {}

    def take(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert frame.number == self._numbers
            self._numbers += 1
            self.frames.add(frame, ready=True)

    def give(self, failure: Failure | None = None) -> Frame:
        """The reply to the frame whose turn it is."""
        frame = self.frames.take()
        assert frame is not None
        for edit in frame.edits:
            self._apply(edit)
        if frame.void or (frame.step and frame.step.guesses and self._is_void(frame.step)):
            return Frame(frame.epoch, frame.lane, frame.number, timings=TIMINGS, void=True)
        samples: list[Sample] = []
        logprobs = self._score(frame.step) if frame.step and frame.step.scoring else None
        for sequence, tokens in zip(frame.step.sequences, frame.step.tokens, strict=True) if frame.step else ():
            assert frame.step
            assert frame.step.start in (None, len(self.fed[sequence]))
            if frame.step.guesses:
                self._guess_marks.setdefault(sequence, set()).add(len(self.fed[sequence]))
            self.fed[sequence] += tokens
            if frame.step and frame.step.compute is Compute.DECODE:
                assert sequence not in self.deferred
                self.deferred[sequence] = sample_row(frame.step, sequence, self.fed[sequence])
        if failure:
            for sequence in frame.step.sequences if frame.step else ():
                self.deferred.pop(sequence, None)
        else:
            ready = {*self.deferred} - self.compiling
            samples = [sample for sequence in ready for sample in self.deferred.pop(sequence)]
            self._sampled |= {s.sequence: (s.position, s.token) for s in samples}
        said = () if failure else tuple(samples)
        return Frame(
            frame.epoch,
            frame.lane,
            frame.number,
            samples=said,
            timings=TIMINGS,
            error=failure,
            prompt_logprobs=None if failure else logprobs,
        )

    def _is_void(self, step: Step) -> bool:
        return step.guessed and self._sampled[step.sequences[0]] != (step.start, step.tokens[0][0])

    @property
    def kept_bytes(self) -> int:
        """What prefixes and marks take of the first stage."""
        marks = {mark for held in (*self._marks.values(), *self._kept_marks.values()) for mark in held.values()}
        return sum(map(len, self.prefixes.values())) + MARK_BYTES[0] * len(marks)

    def _score(self, step: Step) -> PromptLogprobs:
        """What the step reports of its prompt: by all that comes before each token."""
        (sequence,), (row,), scoring = step.sequences, step.tokens, step.scoring
        assert scoring is not None
        assert step.compute is Compute.PREFILL
        before = self.fed[sequence] + row[: scoring.skip + 1]
        start = len(before)
        assert scoring.targets[:-1] == row[scoring.skip + 1 : scoring.skip + len(scoring.targets)]
        found = []
        for target in scoring.targets:
            found.append(logprob(before, target))
            before += (target,)
        tops = scoring.top * len(found)
        return PromptLogprobs(start, tuple(found), (7,) * tops, (-1.0,) * tops)

    def _apply(self, edit: Edit) -> None:
        match edit:
            case Join():
                assert edit.sequence not in self.fed
                self.fed[edit.sequence] = ()
                self._marks[edit.sequence] = {}
                if edit.sampling.grammar:
                    self.compiling.add(edit.sequence)
            case Leave():
                self.compiling.discard(edit.sequence)
                self.deferred.pop(edit.sequence, None)
                del self.fed[edit.sequence], self._marks[edit.sequence]
            case Mark():
                assert edit.length == len(self.fed[edit.sequence])
                assert edit.length not in self._marks[edit.sequence]
                self._marks[edit.sequence][edit.length] = object()
            case Unmark():
                del self._marks[edit.sequence][edit.length]
            case Trim():
                marked = {*self._guess_marks.get(edit.sequence, ()), *self._marks[edit.sequence]}
                assert self._trimmable or edit.length >= len(self.fed[edit.sequence]) or edit.length in marked
                self.fed[edit.sequence] = self.fed[edit.sequence][: edit.length]
            case Save():
                self.prefixes[edit.prefix] = self.fed[edit.sequence]
                self._kept_marks[edit.prefix] = dict(self._marks[edit.sequence])
            case Restore():
                assert self.fed[edit.sequence] == ()
                kept, marks = self.prefixes[edit.prefix], self._kept_marks[edit.prefix]
                assert self._trimmable or edit.length in {len(kept), *marks}
                self.fed[edit.sequence] = kept[: edit.length]
                self._marks[edit.sequence] = {at: mark for at, mark in marks.items() if at <= edit.length}
            case Persist():
                assert edit.prefix in self.prefixes
                self.persisted.append(edit)
            case Drop():
                del self.prefixes[edit.prefix], self._kept_marks[edit.prefix]


def sample_row(step: Step, sequence: int, history: tuple[int, ...]) -> list[Sample]:
    """Sample the positions of a step, which fed the end of a history, up to a first wrong guess."""
    found: list[Sample] = []
    for at in range(len(history) - step.sampled + 1, len(history) + 1):
        found.append(Sample(sequence, at, next_token(history[:at])))
        if history[at : at + 1] != (found[-1].token,):
            break
    return found


def next_token(history: tuple[int, ...]) -> int:
    """1 to 50, by the whole history."""
    return hash(history) % 50 + 1


def logprob(history: tuple[int, ...], token: int) -> float:
    """A whole number from -99 to 0, by the whole history."""
    return -float(hash((history, token)) % 100)


def continuation(prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Return the expected answer to a prompt."""
    history = prompt
    for _ in range(tokens):
        history += (next_token(history),)
    return list(history[len(prompt) :])
