"""Several stages with state of their own: a step may fail on any of them in the middle of the ring."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace

import pytest

from cluster.core.errors import Busy, PromptTooLong
from cluster.core.frames import (
    Compute,
    Drop,
    Edit,
    Failure,
    Frame,
    Join,
    Leave,
    Mark,
    Restore,
    Sample,
    Save,
    StageTiming,
    Trim,
    Unmark,
)
from cluster.core.limits import MARK_TOKENS, MAX_EDITS, MAX_PREFIXES
from cluster.core.request import Request, SamplingParams
from cluster.scheduler import marking, saving
from cluster.scheduler.guessing import Guesser
from cluster.scheduler.outcome import Produced, SampleFailed
from cluster.scheduler.reordering import ReorderBuffer
from cluster.scheduler.scheduler import Scheduler
from effort import effort
from scheduler.stages import Stages, capacity, continuation, sample_row


class OneStage:
    """Breaks the sequences of a failed step, refuses edits of them, and passes failures on."""

    def __init__(self, index: int, last: bool, trimmable: bool) -> None:
        self.turns, self.index, self.last = ReorderBuffer(), index, last
        self.trimmable = trimmable
        self.fed: dict[int, tuple[int, ...]] = {}
        self.marks: dict[int, set[int]] = {}
        self.prefixes: dict[int, tuple[tuple[int, ...], frozenset[int]]] = {}
        self.broken: set[int] = set()
        self.sampled: dict[int, tuple[int, int]] = {}
        self.guess_marks: dict[int, set[int]] = {}

    def step(self, frame: Frame, fail: bool) -> Frame:
        for edit in frame.edits:
            self._apply(edit)
        if frame.void or (not fail and not frame.error and frame.step and frame.step.guesses and self._is_void(frame)):
            return replace(frame, void=True)
        rows = frame.step.sequences if frame.step else ()
        tokens = frame.step.tokens if frame.step else ()
        if not frame.error and (fail or not self.broken.isdisjoint(rows)):
            reason = "STAGE_FAILED" if fail else "BROKEN"
            frame = replace(frame, error=Failure(self.index, reason, f"no: {rows}"))
        if frame.error:
            self.broken |= set(rows) & set(self.fed)
            return frame
        for sequence, row in zip(rows, tokens, strict=True):
            assert frame.step
            assert frame.step.start in (None, len(self.fed[sequence]))
            if frame.step.guesses:
                self.guess_marks.setdefault(sequence, set()).add(len(self.fed[sequence]))
            self.fed[sequence] += row
        decodes = self.last and frame.step is not None and frame.step.compute is Compute.DECODE
        samples: list[Sample] = []
        for sequence in rows if decodes else ():
            assert frame.step
            samples += sample_row(frame.step, sequence, self.fed[sequence])
        self.sampled |= {s.sequence: (s.position, s.token) for s in samples}
        return replace(frame, samples=tuple(samples))

    def _is_void(self, frame: Frame) -> bool:
        assert frame.step
        (sequence,), ((token, *_),), start = frame.step.sequences, frame.step.tokens, frame.step.start
        assert start is not None
        if sequence in self.broken or not frame.step.guessed:
            return False
        return start > len(self.fed[sequence]) or (self.last and self.sampled[sequence] != (start, token))

    def _apply(self, edit: Edit) -> None:
        match edit:
            case Join():
                self.fed[edit.sequence], self.marks[edit.sequence] = (), set()
            case Leave():
                del self.fed[edit.sequence], self.marks[edit.sequence]
                self.broken.discard(edit.sequence)
            case Drop():
                self.prefixes.pop(edit.prefix, None)
            case Trim() if edit.sequence not in self.broken:
                marked = {*self.guess_marks.get(edit.sequence, ()), *self.marks[edit.sequence]}
                assert self.trimmable or edit.length >= len(self.fed[edit.sequence]) or edit.length in marked
                self.fed[edit.sequence] = self.fed[edit.sequence][: edit.length]
            case Mark() if edit.sequence not in self.broken:
                assert edit.length == len(self.fed[edit.sequence])
                self.marks[edit.sequence].add(edit.length)
            case Unmark():
                self.marks[edit.sequence].discard(edit.length)
            case Save() if edit.sequence not in self.broken:
                self.prefixes[edit.prefix] = self.fed[edit.sequence], frozenset(self.marks[edit.sequence])
            case Restore() if edit.prefix in self.prefixes and edit.sequence not in self.broken:
                tokens, marks = self.prefixes[edit.prefix]
                assert self.trimmable or edit.length in {len(tokens), *marks}
                self.fed[edit.sequence] = tokens[: edit.length]
                self.marks[edit.sequence] = {at for at in marks if at <= edit.length}
            case _:
                self.broken.add(edit.sequence)


class Row:
    """A scheduler and its stages, which work in any order that their turns allow."""

    def __init__(
        self,
        rng: random.Random,
        count: int,
        guesser: Guesser | None = None,
        **options: int | float | Mapping[int, float] | None,
    ) -> None:
        self.rng, self.now = rng, 0.0
        plan = capacity(window=count + 1, stages=count, **options)  # type: ignore[arg-type]
        self.scheduler = Scheduler(1, plan, frozenset(), guesser)
        trimmable = bool(options.get("trimmable", True))
        self.stages = [OneStage(i, i == count - 1, trimmable) for i in range(count)]
        self.lines: list[deque[Frame]] = [deque() for _ in range(count + 1)]
        self.said: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, str] = {}
        self.void: set[int] = set()
        self.asked: dict[str, Request] = {}

    def write(self) -> None:
        self.now += 0.001
        self.lines[0].extend(self.scheduler.next_frames(self.now))
        self.lines[0].extend(self.scheduler.guess_frames(self.now))

    def advance(self, at: int, fail: bool = False) -> None:
        """Let a stage, or the coordinator behind the last, take what has arrived and do one thing."""
        if at == len(self.stages):
            if self.lines[at]:
                self._back(self.lines[at].popleft())
            return
        stage = self.stages[at]
        while self.lines[at]:
            stage.turns.add(self.lines[at].popleft(), ready=True)
        if frame := stage.turns.take():
            if frame.void and frame.number not in self.void and self.rng.random() < 0.5:
                frame = replace(frame, void=False)  # to skip it would only save time
            frame = stage.step(frame, fail and frame.step is not None and not frame.void)
            if frame.void:
                self.void.add(frame.number)
            self.lines[at + 1].append(frame)

    def _back(self, frame: Frame) -> None:
        timings = tuple(StageTiming(i, 0, 1000, 0) for i in range(len(self.stages)))
        reply = replace(frame, edits=(), step=None, timings=timings)
        for event in self.scheduler.on_frame(reply, self.now).events:
            assert event.request_id not in self.ended
            if isinstance(event, Produced):
                self.said[event.request_id].append(event.sample.token)
                if event.finish:
                    self.ended[event.request_id] = "finished"
            else:
                assert isinstance(event, SampleFailed)
                self.ended[event.request_id] = event.reason
        self.write()

    def settle(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.in_flight:
                return
            for at in range(len(self.stages) + 1):
                self.advance(at)
        raise AssertionError("the ring never came to rest")


def ask(name: str, prompt: tuple[int, ...], max_tokens: int = 3, **more: object) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens, **more)  # type: ignore[arg-type]


def test_an_abort_during_a_failed_step_leaves_no_poisoned_prefix(rng: random.Random) -> None:
    row = Row(rng, 2, lanes=2, budget=10_000, prefixes=5_000, chunk=8)
    prompt = tuple(range(1, 40))
    row.scheduler.submit(ask("talks", (5,), 30))
    row.scheduler.submit(ask("gone", prompt))
    row.write()
    for _ in range(4):
        row.advance(0)
    for _ in range(4):  # all that came to the second stage fails there
        row.advance(1, fail=bool(row.stages[1].fed))
    row.scheduler.end("gone")
    row.write()
    row.settle()
    row.scheduler.submit(ask("next", (*prompt, 50, 51)))
    row.write()
    row.settle()
    assert row.ended["next"] == "finished"
    assert row.said["next"] == continuation((*prompt, 50, 51), 3)
    assert all(len(s.prefixes) == len(row.scheduler.prefixes) for s in row.stages)
    assert all(not s.fed for s in row.stages)


@pytest.mark.parametrize("trimmable", [True, False])
@pytest.mark.parametrize("fails", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("mark_tokens", [4, MARK_TOKENS])
def test_a_failure_in_mid_ring_poisons_nothing(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, fails: float, trimmable: bool, mark_tokens: int
) -> None:
    """Aborts, failures, prefixes, shared beginnings and overtaking, in any order. Only who shares a step with a
    sequence that an earlier failure broke may fail of it; no prefix and no copy is poisoned, and nothing is left.
    With few tokens between them, there are many marks, and leaders are often saved.
    """
    for module in (marking, saving):
        monkeypatch.setattr(module, "MARK_TOKENS", mark_tokens)
    for i in range(effort(8, 40, 2)):
        rows = 1 if i % 2 else rng.randint(1, 4)
        row = play(rng, fails, trimmable, rows)
        ends = {"finished", "aborted", *(("STAGE_FAILED",) if fails else ()), *(("BROKEN",) if rows > 1 else ())}
        assert set(row.ended.values()) <= ends
        for stage in row.stages:
            assert not stage.fed
            assert len(stage.prefixes) == len(row.scheduler.prefixes)


def play(
    rng: random.Random,
    fails: float,
    trimmable: bool,
    rows: int,
    *,
    count: int = 0,
    guesser: Guesser | None = None,
    steps: int = 4000,
    verify_costs: Mapping[int, float] | None = None,
) -> Row:
    """Let requests come, share beginnings, fail and go, on ``count`` stages or a few, and check each answer."""
    count = count or rng.randint(2, 4)
    row = Row(
        rng,
        count,
        guesser,
        lanes=rng.randint(1, count),
        rows=rows,
        trimmable=trimmable,
        budget=rng.choice([80, 200, 1000]),
        prefixes=rng.choice([0, 50, 150]),
        chunk=rng.randint(1, 16),
        max_step_ms=rng.choice([None, 1.0]),
        verify_costs=verify_costs,
    )
    prompts = dict[str, tuple[int, ...]]()
    for _ in range(steps):
        kind = rng.random()
        if kind < 0.02 and len(prompts) < 50:
            start = rng.choice([(), *prompts.values()])[: rng.randint(0, 30)]
            prompt = (*start, *(rng.randint(1, 9) for _ in range(rng.randint(1, 25))))
            try:
                name = f"r{len(prompts)}"
                row.asked[name] = ask(name, prompt, rng.randint(1, 9))
                row.scheduler.submit(row.asked[name])
                prompts[name] = prompt
            except (Busy, PromptTooLong):
                del row.asked[name]
                continue
            row.write()
        elif kind < 0.025 and row.scheduler.sequences:
            name = rng.choice(row.scheduler.sequences).request.id
            row.scheduler.end(name)
            row.ended[name] = "aborted"
            row.write()
        else:
            row.advance(rng.randint(0, count), fail=rng.random() < fails)
    row.settle()
    assert set(row.ended) == set(prompts)
    for name, tokens in row.said.items():
        assert tokens == continuation(prompts[name], len(tokens))
    return row


def test_a_long_prompt_ends_beside_an_endless_supply_of_short_ones() -> None:
    plan = capacity(lanes=2, rows=4, window=3, chunk=8, budget=100_000, max_step_ms=100.0)
    scheduler, stages = Scheduler(1, plan, frozenset()), Stages()
    scheduler.submit(ask("long", tuple(range(1, 401)), 1))
    shorts = 0
    for _ in range(3000):
        while len(scheduler.sequences) < 9:
            scheduler.submit(ask(f"s{shorts}", (shorts % 50 + 1,) * 41, 1))
            shorts += 1
        stages.take(scheduler.next_frames(0.0))
        scheduler.on_frame(stages.give())
        if all(s.request.id != "long" for s in scheduler.sequences):
            break
    assert all(s.request.id != "long" for s in scheduler.sequences)
    assert shorts > 40


def test_an_abort_in_prefill_stops_nobodys_token() -> None:
    def order(abort: bool) -> str:
        plan = capacity(lanes=2, window=3, chunk=8, budget=100_000)
        scheduler, stages = Scheduler(1, plan, frozenset()), Stages()
        scheduler.submit(ask("long", tuple(range(1, 401)), 1))
        stages.take(scheduler.next_frames(0.0))
        scheduler.submit(ask("talks", (5,), 30))
        stages.take(scheduler.next_frames(0.0))
        went = ""
        for i in range(5):
            reply = stages.give()
            went += "D" if reply.samples else "-"
            scheduler.on_frame(reply)
            if i == 1 and abort:
                scheduler.end("long")
            stages.take(scheduler.next_frames(0.0))
        return went

    assert order(abort=True).count("D") >= order(abort=False).count("D")


def test_edits_gather_while_the_ring_is_slow() -> None:
    """Five thousand requests come and go within one slow chunk; few frames wait, and none is too large."""
    plan = capacity(lanes=2, rows=32, window=3, chunk=512, budget=10**7, max_step_ms=100.0)
    scheduler, stages = Scheduler(1, plan, frozenset()), Stages()
    scheduler.submit(ask("long", tuple(range(1, 4001)), 1))
    stages.take(scheduler.next_frames(0.0))
    for i in range(5000):
        scheduler.submit(ask(f"r{i}", tuple(range(1, 50)), 1))
        stages.take(scheduler.next_frames(0.0))
        scheduler.end(f"r{i}")
        stages.take(scheduler.next_frames(0.0))
    assert len(stages.frames) <= 5
    while stages.frames:
        scheduler.on_frame(stages.give())
        stages.take(frames := scheduler.next_frames(0.0))
        assert all(len(f.edits) < 100 for f in frames)
    assert stages.fed == {}


def test_prefixes_are_bounded_in_number_and_dropping_all_fits_a_frame() -> None:
    scheduler = Scheduler(1, capacity(rows=4, budget=60_000, prefixes=60_000, chunk=512), frozenset())
    stages = Stages()
    for i in range(MAX_PREFIXES + 200):
        scheduler.submit(ask(f"p{i}", (i % 251 + 1, i // 251 + 1, *range(1, 8)), 1))
        stages.take(scheduler.next_frames(0.0))
        while stages.frames:
            scheduler.on_frame(stages.give())
            stages.take(scheduler.next_frames(0.0))
    assert len(stages.prefixes) == len(scheduler.prefixes) == MAX_PREFIXES
    scheduler.submit(ask("big", tuple(range(1, 59_000)), 900))
    stages.take(frames := scheduler.next_frames(0.0))
    assert max(len(f.edits) for f in frames) <= MAX_EDITS
    while stages.frames:
        scheduler.on_frame(stages.give())
        stages.take(scheduler.next_frames(0.0))
    assert len(stages.prefixes) == len(scheduler.prefixes)


def test_room_is_not_made_of_the_prefix_that_a_request_starts_from() -> None:
    scheduler, stages = Scheduler(1, capacity(budget=150, prefixes=100), frozenset()), Stages()

    def run(name: str, prompt: tuple[int, ...]) -> None:
        scheduler.submit(ask(name, prompt))
        stages.take(scheduler.next_frames(0.0))
        while stages.frames:
            scheduler.on_frame(stages.give())
            stages.take(scheduler.next_frames(0.0))

    first, other = tuple(range(100, 140)), tuple(range(200, 240))
    run("first", first)
    run("other", other)
    scheduler.submit(ask("again", (*first, *range(1, 21)), 10))
    (sequence,) = scheduler.sequences
    assert sequence.cached >= 39
