"""How many frames may be in flight: the arithmetic, against stages that are simulated in time."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from statistics import quantiles

import pytest

from cluster.core.frames import Compute, Frame, Sample, StageTiming, Step, Trim
from cluster.core.lap_times import LapTimes, mean_token_time
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.acceptance_rates import AcceptanceRates, RightShare
from cluster.scheduler.guess_window import choose_window
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.reordering import ReorderBuffer
from cluster.scheduler.scheduler import Scheduler
from effort import effort
from scheduler.stages import capacity

HOP_MS = 0.8
EQUAL = [(10.0,) * stages for stages in (2, 3, 4)]
UNEQUAL = [(15.0, 10.0), (5.0, 20.0), (20.0, 5.0), (5.0, 20.0, 5.0), (20.0, 5.0, 5.0)]


class Known:
    """Each token is the sum of its position and its prompt's first token; guesses are right with a probability."""

    def __init__(self, rng: random.Random, acceptance: float) -> None:
        self.rng, self.acceptance = rng, acceptance

    def propose(self, request: Request, tokens: list[int], count: int) -> Guess | None:
        right = self.rng.random() < self.acceptance
        return Guess((_token(request.prompt, len(tokens)) if right else 1_000,), GuessSource.REPLAY)

    def hint(self, request: Request, position: int, tokens: tuple[int, ...]) -> None: ...

    def learn(self, request: Request, source: GuessSource, right: int, wrong: int) -> None: ...

    def observe(self, request: Request, tokens: tuple[int, ...]) -> None: ...

    def forget(self, request: Request) -> None: ...

    def forget_client(self, client: str) -> None: ...


def _token(prompt: tuple[int, ...], position: int) -> int:
    return 1 + (prompt[0] + position) % 900


@dataclass
class _Stage:
    ms: float
    turns: ReorderBuffer = field(default_factory=ReorderBuffer)
    busy: bool = False
    fed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    came: dict[int, float] = field(default_factory=dict)
    """When each frame that waits here arrived."""


class TimedRing:
    """A scheduler and stages that take their time. ``arrivals`` are when each request's tokens came, in ms."""

    def __init__(
        self,
        stages: tuple[float, ...],
        guesser: Known | None,
        prefill_ms: float = 1.0,
        costs: Mapping[int, float] | None = None,
        varies: float = 0.0,
    ) -> None:
        """``varies``: the share by which a token takes a stage more or less time. It depends on the token's place."""
        self.varies = varies
        self.costs = {1: 1.0} | dict(costs or {})
        plan = capacity(lanes=len(stages), stages=len(stages), budget=10**6, chunk=64, rows=1, verify_costs=costs)
        self.scheduler = Scheduler(1, plan, frozenset(), guesser)  # type: ignore[arg-type]
        self.stages, self.prefill_ms = [_Stage(ms) for ms in stages], prefill_ms
        self.now, self.numbers = 0.0, count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)
        self.sampled: dict[int, tuple[int, int]] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}

    def at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), happens))

    def run(self) -> None:
        while self.events:
            self.now, _, happens = heapq.heappop(self.events)
            happens()

    def ask(self, name: str, first: int, prompt: int, tokens: int) -> None:
        self.scheduler.submit(Request(name, (first,) * prompt, SamplingParams(), tokens, ignore_eos=True))
        self.prompts = {s.id: s.request.prompt for s in self.scheduler.sequences} | self.prompts
        self.send()

    def send(self) -> None:
        for frame in self.scheduler.next_frames(self.now / 1e3):
            self.pass_on(0, frame)
        for frame in self.scheduler.guess_frames(self.now / 1e3):
            self.pass_on(0, frame)

    def pass_on(self, to: int, frame: Frame) -> None:
        self.at(self.now + HOP_MS, lambda: self.arrive(to, frame))

    def arrive(self, to: int, frame: Frame) -> None:
        if to == len(self.stages):
            events = self.scheduler.on_frame(replace(frame, edits=(), step=None), self.now / 1e3).events
            for event in events:
                self.arrivals[event.request_id].append(self.now)
            self.send()
            return
        self.stages[to].came[frame.number] = self.now
        self.stages[to].turns.add(frame, ready=True)
        self.work(to)

    def work(self, at: int) -> None:
        stage = self.stages[at]
        if stage.busy or (frame := stage.turns.take()) is None:
            return
        stage.busy = True
        for edit in frame.edits:
            if isinstance(edit, Trim):
                stage.fed[edit.sequence] = min(stage.fed[edit.sequence], edit.length)
        ms, samples = 0.0, ()
        if frame.step and not frame.void:
            if frame.step.guesses and self.is_void(at, frame.step):
                frame = replace(frame, void=True)
            else:
                ms, samples = self.compute(at, frame.step)
        waited = self.now - stage.came.pop(frame.number)
        timing = StageTiming(at, round(waited * 1e3), round(ms * 1e3), 0)
        done = replace(frame, timings=(*frame.timings, timing), samples=samples)
        self.at(self.now + ms, lambda: self.finish(at, done))

    def is_void(self, at: int, step: Step) -> bool:
        (sequence,), ((token, *_),) = step.sequences, step.tokens
        last = at == len(self.stages) - 1
        follows_void = (step.start or 0) > self.stages[at].fed[sequence]
        return step.guessed and (follows_void or (last and self.sampled[sequence] != (step.start, token)))

    def compute(self, at: int, step: Step) -> tuple[float, tuple[Sample, ...]]:
        (sequence,), (row,) = step.sequences, step.tokens
        stage = self.stages[at]
        stage.fed[sequence] += len(row)
        if step.compute is Compute.PREFILL:
            return self.prefill_ms * len(row), ()
        ms = stage.ms * self.costs[len(row)]
        if self.varies:
            chance = random.Random(f"{at} {sequence} {stage.fed[sequence]}").random()
            ms *= 1 + self.varies * (2 * chance - 1)
        if at < len(self.stages) - 1:
            return ms, ()
        samples: list[Sample] = []
        for i, following in enumerate((*row[1:], None)):
            position = stage.fed[sequence] - len(row) + 1 + i
            samples.append(Sample(sequence, position, _token(self.prompts[sequence], position)))
            if samples[-1].token != following:
                break
        self.sampled[sequence] = samples[-1].position, samples[-1].token
        return ms, tuple(samples)

    def finish(self, at: int, frame: Frame) -> None:
        self.stages[at].busy = False
        self.pass_on(at + 1, frame)
        self.work(at)


def _is_clear(stages: tuple[float, ...], acceptance: float) -> bool:
    """Return whether a slightly wrong estimate of the acceptance leaves the choice as it is."""
    windows = {choose_window(LapTimes(stages, HOP_MS), acceptance - less, len(stages)) for less in (0.0, 0.2)}
    return len(windows) == 1


def token_ms(stages: tuple[float, ...], acceptance: float | None, rng: random.Random, varies: float = 0.0) -> float:
    """Return one user's mean time per token, after the scheduler has learnt what guesses are worth."""
    tokens = effort(500, 4000)
    ring = TimedRing(stages, None if acceptance is None else Known(rng, acceptance), varies=varies)
    ring.ask("warm", 3, 2, 150)
    ring.run()
    ring.ask("a", 4, 2, tokens)
    ring.run()
    arrivals = ring.arrivals["a"]
    assert len(arrivals) == tokens
    return (arrivals[-1] - arrivals[0]) / (tokens - 1)


@pytest.mark.parametrize(
    ("stages", "acceptance"),
    [
        (stages, acceptance)
        for stages in (*EQUAL, *UNEQUAL)
        for acceptance in (0.5, 0.7, 0.9)
        if _is_clear(stages, acceptance)
    ],
    ids=str,
)
def test_the_speed_up_is_the_formulas(stages: tuple[float, ...], acceptance: float, rng: random.Random) -> None:
    off, found = token_ms(stages, None, rng), token_ms(stages, acceptance, rng)
    times = LapTimes(stages, HOP_MS)
    window = choose_window(times, acceptance, len(stages))
    expected = mean_token_time(times, window, acceptance)
    assert off == pytest.approx(times.lap, rel=0.01)
    assert found == pytest.approx(expected, rel=effort(12, 5) / 100)
    assert found < 1.02 * off


@pytest.mark.parametrize("stages", [*EQUAL, *UNEQUAL], ids=str)
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
def test_guesses_that_are_mostly_wrong_cost_next_to_nothing(
    stages: tuple[float, ...], acceptance: float, rng: random.Random
) -> None:
    assert token_ms(stages, acceptance, rng) < 1.02 * token_ms(stages, None, rng)


@pytest.mark.parametrize("stages", [(10.0, 10.0), (20.0, 5.0), (10.0,) * 4], ids=str)
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6])
def test_guesses_cost_next_to_nothing_where_no_two_tokens_take_the_same_time(
    stages: tuple[float, ...], acceptance: float, rng: random.Random
) -> None:
    assert token_ms(stages, acceptance, rng, 0.3) < 1.02 * token_ms(stages, None, rng, 0.3)


@pytest.mark.parametrize(
    "stages", [*EQUAL, (20.0, 5.0), (5.0, 20.0), (5.0, 20.0, 5.0, 5.0), (10.0, 5.0, 5.0, 15.0)], ids=str
)
def test_a_second_user_does_not_notice_the_guesses_of_the_first(stages: tuple[float, ...], rng: random.Random) -> None:
    """Its tokens and its first one come as early, whether the first user's guesses are right or wrong.

    Two users of four stages are both guessed, in turns: a guess goes out just behind a certain frame of the other. Only
    the second token may wait for one frame: guesses that were sent before the second user came are still in flight.
    """

    def second(acceptance: float | None) -> tuple[float, float, float]:
        ring = TimedRing(stages, None if acceptance is None else Known(rng, acceptance))
        ring.ask("warm", 3, 2, 100)
        ring.run()
        ring.ask("first", 4, 2, 700)
        asked = [ring.now + 500.0 + 900.0 * i for i in range(8)]
        for i, when in enumerate(asked):
            ring.at(when, lambda i=i: ring.ask(f"second{i}", 5 + i, 16, 20))  # type: ignore[misc]
        ring.run()
        came = [ring.arrivals[f"second{i}"] for i in range(8)]
        gaps = [[after - before for before, after in pairwise(each)] for each in came]
        waits = [each[0] - when for each, when in zip(came, asked, strict=True)]
        later = [gap for each in gaps for gap in each[1:]]
        return quantiles(later, n=100)[98], max(each[0] for each in gaps), max(waits)

    gap, first_gap, wait = second(None)
    for acceptance in (0.0, 0.8):
        guessed_gap, guessed_first_gap, guessed_wait = second(acceptance)
        assert guessed_gap <= 1.01 * gap
        assert guessed_first_gap <= 1.01 * first_gap + max(stages)
        assert guessed_wait <= wait + 2 * max(stages)


@pytest.mark.parametrize(("stages", "gain"), [((10.0,) * 4, 1.3), ((5.0, 20.0, 5.0, 5.0), 0.98)], ids=str)
def test_two_users_share_the_gain_where_stages_have_time_for_their_guesses(
    stages: tuple[float, ...], gain: float, rng: random.Random
) -> None:
    """The two keep a stage of 20 ms busy without any guess, so there each guess would delay a token."""

    def slowest_ms(acceptance: float | None) -> float:
        ring = TimedRing(stages, None if acceptance is None else Known(rng, acceptance))
        ring.ask("warm", 3, 2, 100)
        ring.run()
        for i in range(2):
            ring.ask(f"user{i}", 4 + i, 2, 300)
        ring.run()
        came = [ring.arrivals[f"user{i}"] for i in range(2)]
        return max((each[-1] - each[0]) / (len(each) - 1) for each in came)

    assert slowest_ms(0.7) < slowest_ms(None) / gain


def test_more_frames_than_stages_are_never_in_flight() -> None:
    assert choose_window(LapTimes((10.0, 10.0), 0.8), 1.0, 8) == 2
    assert choose_window(LapTimes((10.0,) * 4, 0.8), 0.9, 3) == 3
    assert choose_window(LapTimes((10.0,), 0.8), 1.0, 8) == 1


def test_frames_that_do_not_wait_for_each_other_follow_from_the_slowest_stage() -> None:
    stages = [(10.0,) * 4, (10.0, 10.0, 10.4, 10.0), (10.0, 5.0, 5.0, 15.0), (5.0, 20.0, 5.0, 5.0), (0.0, 0.0)]
    assert [LapTimes(times, 0.1).slots for times in stages] == [4, 4, 2, 1, 2]


def test_a_slow_first_stage_is_guessed_only_for_good_guesses() -> None:
    slow_first, slow_last = LapTimes((20.0, 5.0), 0.8), LapTimes((5.0, 20.0), 0.8)
    assert choose_window(slow_first, 0.5, 2) == 1
    assert choose_window(slow_first, 0.9, 2) == 2
    assert choose_window(slow_last, 0.5, 2) == 2


def test_what_a_sequence_shows_soon_weighs_more_than_what_was_known() -> None:
    acceptance, own = AcceptanceRates(), dict[GuessSource, RightShare]()
    for _ in range(300):
        acceptance.learn({}, GuessSource.NGRAM, right=True)
    assert acceptance.estimate(own, GuessSource.NGRAM) > 0.9
    for _ in range(10):
        acceptance.learn(own, GuessSource.NGRAM, right=False)
    assert acceptance.estimate(own, GuessSource.NGRAM) < 0.15
    assert acceptance.estimate({}, GuessSource.NGRAM) > 0.75
    assert 0 < acceptance.estimate(own, GuessSource.DRAFT) < 0.5
