"""The effect of a long prompt on other answers: two simulated stages, with the costs of steps and chunks.

Frames take their turns on a stage as they do on a real one; a chunk's tokens cost more the longer the context is.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from statistics import quantiles

import pytest

from cluster.core.frames import Compute, Frame, Sample, StageTiming, Step
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.reordering import ReorderBuffer
from cluster.scheduler.scheduler import Scheduler
from scheduler.stages import capacity

STREAMS, TOKENS, PROMPT, LONG = 4, 300, 16, 4096
HOP_MS = 0.4


@dataclass(frozen=True)
class Machine:
    """Milliseconds of one stage: for any frame, a row that decodes, a token of a prompt, and that with each before."""

    frame: float
    row: float
    token: float
    pair: float
    budget: float

    def took(self, step: Step, context: int) -> float:
        if step.compute is Compute.DECODE:
            return self.frame + self.row * len(step.sequences) + self.pair * context
        length = len(step.tokens[0])
        return self.frame + length * (self.token + self.pair * (context + length / 2))


MACHINES = {
    "small_model": Machine(3.0, 1.5, 0.64, 2e-4, budget=20.0),
    "large_model": Machine(20.0, 1.5, 0.53, 2e-5, budget=100.0),
    "no_attention": Machine(3.0, 1.5, 0.64, 0.0, budget=20.0),
}


@dataclass
class Ring:
    """A scheduler and its stages; ``said`` is when each request's tokens came."""

    machine: Machine
    now: float = 0.0
    said: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        plan = capacity(lanes=2, rows=32, window=3, budget=10**9, chunk=512, max_step_ms=self.machine.budget)
        self.scheduler = Scheduler(1, plan, frozenset())
        self.turns, self.busy = [ReorderBuffer(), ReorderBuffer()], [False, False]
        self.context: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = count()

    def at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), happens))

    def run(self) -> None:
        while self.events:
            self.now, _, happens = heapq.heappop(self.events)
            happens()

    def ask(self, name: str, prompt: int, tokens: int) -> None:
        self.scheduler.submit(Request(name, tuple(range(prompt)), SamplingParams(), tokens, ignore_eos=True))
        self.send()

    def send(self) -> None:
        for frame in self.scheduler.next_frames(self.now / 1e3):
            self.pass_on(0, frame)

    def pass_on(self, stage: int, frame: Frame) -> None:
        self.at(self.now + HOP_MS, lambda: self.arrived(stage, frame))

    def arrived(self, stage: int, frame: Frame) -> None:
        if stage == len(self.turns):
            self.returned(frame)
            return
        self.turns[stage].add(frame, ready=True)
        self.work(stage)

    def work(self, stage: int) -> None:
        if self.busy[stage] or (frame := self.turns[stage].take()) is None:
            return
        ms = self.computed(stage, frame.step) if frame.step else 0.0
        timing = StageTiming(stage, 0, round(ms * 1e3), 0)
        self.busy[stage] = True
        self.at(self.now + ms, lambda: self.done(stage, replace(frame, timings=(*frame.timings, timing))))

    def computed(self, stage: int, step: Step) -> float:
        ms = self.machine.took(step, sum(self.context[stage, s] for s in step.sequences))
        for sequence in step.sequences:
            self.context[stage, sequence] += len(step.tokens[0])
        return ms

    def done(self, stage: int, frame: Frame) -> None:
        self.busy[stage] = False
        self.pass_on(stage + 1, frame)
        self.work(stage)

    def returned(self, frame: Frame) -> None:
        decodes = frame.step and frame.step.compute is Compute.DECODE
        samples = tuple(Sample(s, 0, 7) for s in frame.step.sequences) if frame.step and decodes else ()
        outcome = self.scheduler.on_frame(replace(frame, edits=(), step=None, samples=samples))
        for event in outcome.events:
            self.said[event.request_id].append(self.now)
        self.send()


def gap_p99(machine: Machine, *, disturbed: bool) -> float:
    """Milliseconds between two tokens of the streams."""
    ring = Ring(machine)
    for i in range(STREAMS):
        ring.at(0.0, lambda name=f"stream {i}": ring.ask(name, PROMPT, TOKENS))  # type: ignore[misc]
    if disturbed:
        ring.at(30 * machine.frame, lambda: ring.ask("long", LONG, 1))
    ring.run()
    assert [len(times) for name, times in ring.said.items() if name != "long"] == [TOKENS] * STREAMS
    gaps = [b - a for name, times in ring.said.items() if name != "long" for a, b in pairwise(times)]
    return quantiles(gaps, n=100)[98]


@pytest.mark.parametrize("name", MACHINES)
def test_a_long_prompt_at_most_doubles_the_time_between_tokens(name: str) -> None:
    machine = MACHINES[name]
    assert gap_p99(machine, disturbed=True) <= 2 * gap_p99(machine, disturbed=False)
