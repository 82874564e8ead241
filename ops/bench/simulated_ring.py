"""Simulates a pipeline in time: the scheduler's own frames on stages that take a set time for each.

It says what stages of these speeds would do for one user with guesses, for several users, and for a long prompt. Stages
only wait for each other: messages take the same time always, and nothing else runs. A guesser replays answers with a
set share of right tokens, as ``replay_coordinator`` does for a real pipeline.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from figures import options, print_figures
from pipeline_rounds import PROMPT, RATES, USERS_PROMPT, fresh_prompt, rate_name
from replay_coordinator import ReplayGuesser

from cluster.core.frames import Compute, Frame, Join, Leave, Restore, Sample, Save, StageTiming, Step, Trim
from cluster.core.lap_times import LapTimes, mean_token_time
from cluster.core.limits import PREFILL_CHUNK
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.reordering import ReorderBuffer
from cluster.scheduler.scheduler import Scheduler

ROOM = 1 << 40
MOST_ROWS = 256
MAX_STEP_MS = 100.0


@dataclass(frozen=True)
class StageCosts:
    """What frames cost: ``rows_ms`` has each stage's milliseconds by the rows of a decode frame.

    ``token_ms`` are each stage's milliseconds per token of a prompt; a chunk also costs what a frame of one row does,
    since both read all weights. ``hop_ms`` is the time of a message.
    """

    rows_ms: Mapping[int, Sequence[float]]
    token_ms: Sequence[float]
    hop_ms: float

    @property
    def lap(self) -> LapTimes:
        return LapTimes(tuple(self.rows_ms[1]), self.hop_ms)

    def decode_ms(self, stage: int, rows: int) -> float:
        """Return the time of a decode frame; between two measured numbers of rows, along the line between them."""
        known = sorted(self.rows_ms)
        at = bisect_left(known, rows)
        if at == len(known):
            return self.rows_ms[known[-1]][stage] * rows / known[-1]
        high = known[at]
        if high == rows:
            return self.rows_ms[high][stage]
        low = known[at - 1]
        share = (rows - low) / (high - low)
        return (1 - share) * self.rows_ms[low][stage] + share * self.rows_ms[high][stage]

    def chunk_ms(self, stage: int, tokens: int) -> float:
        """Return the time of a chunk of a prompt."""
        return self.rows_ms[1][stage] + tokens * self.token_ms[stage]


@dataclass
class _Stage:
    frames: ReorderBuffer = field(default_factory=ReorderBuffer)
    busy: bool = False
    fed: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    came: dict[int, float] = field(default_factory=dict)
    """When each frame that waits here arrived."""

    def apply(self, frame: Frame) -> None:
        for edit in frame.edits:
            match edit:
                case Join():
                    self.fed[edit.sequence] = 0
                case Trim():
                    self.fed[edit.sequence] = min(self.fed[edit.sequence], edit.length)
                case Save():
                    self.kept[edit.prefix] = self.fed[edit.sequence]
                case Restore():
                    self.fed[edit.sequence] = edit.length
                case Leave():
                    del self.fed[edit.sequence]


class SimulatedRing:
    """A scheduler and simulated stages. ``arrivals`` has the times of each request's tokens, in milliseconds."""

    def __init__(self, costs: StageCosts) -> None:
        self._costs, stages = costs, len(costs.token_ms)
        room = (ROOM,) * stages
        capacity = Capacity(
            lanes=stages,
            rows=MOST_ROWS,
            window=stages + 1,
            budget=room,
            prefix_budget=room,
            cost_of=lambda tokens: (tokens,) * stages,
            max_chunk=lambda context: 4 * PREFILL_CHUNK,
            max_step_ms=MAX_STEP_MS,
        )
        self._scheduler = Scheduler(1, capacity, frozenset(), ReplayGuesser())
        self._stages = [_Stage() for _ in range(stages)]
        self._sampled: dict[int, tuple[int, int]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.now = 0.0
        self.chunks = 0
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)

    def run(self, *requests: Request) -> list[list[float]]:
        """Serve the requests, all at once, to their end. Return when the tokens of each came, from now."""
        began = self.now
        self._scheduler.submit(*requests)
        self._send()
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return [[when - began for when in self.arrivals.pop(request.id)] for request in requests]

    def _send(self) -> None:
        for frame in self._scheduler.next_frames(self.now / 1e3):
            self.chunks += bool(frame.step and frame.step.compute is Compute.PREFILL)
            self._pass_on(0, frame)
        for frame in self._scheduler.guess_frames(self.now / 1e3):
            self._pass_on(0, frame)

    def _at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happens))

    def _pass_on(self, to: int, frame: Frame) -> None:
        self._at(self.now + self._costs.hop_ms, lambda: self._arrive(to, frame))

    def _arrive(self, to: int, frame: Frame) -> None:
        if to < len(self._stages):
            self._stages[to].came[frame.number] = self.now
            self._stages[to].frames.add(frame, ready=True)
            self._work(to)
            return
        outcome = self._scheduler.on_frame(replace(frame, edits=(), step=None), self.now / 1e3)
        for event in outcome.events:
            self.arrivals[event.request_id].append(self.now)
        self._send()

    def _work(self, at: int) -> None:
        stage = self._stages[at]
        if stage.busy or (frame := stage.frames.take()) is None:
            return
        stage.busy, ms, samples = True, 0.0, ()
        stage.apply(frame)
        if frame.step and not frame.void:
            if frame.step.guesses and self._is_void(at, frame.step):
                frame = replace(frame, void=True)
            else:
                ms, samples = self._compute(at, frame.step)
        waited = self.now - stage.came.pop(frame.number)
        timing = StageTiming(at, round(waited * 1e3), round(ms * 1e3), 0)
        done = replace(frame, timings=(*frame.timings, timing), samples=samples)
        self._at(self.now + ms, lambda: self._finish(at, done))

    def _finish(self, at: int, frame: Frame) -> None:
        self._stages[at].busy = False
        self._pass_on(at + 1, frame)
        self._work(at)

    def _is_void(self, at: int, step: Step) -> bool:
        sequence, start = step.sequences[0], step.start or 0
        last = at == len(self._stages) - 1
        follows_void = start > self._stages[at].fed[sequence]
        return follows_void or (last and self._sampled[sequence] != (start, step.tokens[0][0]))

    def _compute(self, at: int, step: Step) -> tuple[float, tuple[Sample, ...]]:
        stage = self._stages[at]
        for sequence, tokens in zip(step.sequences, step.tokens, strict=True):
            stage.fed[sequence] += len(tokens)
        if step.compute is Compute.PREFILL:
            return self._costs.chunk_ms(at, len(step.tokens[0])), ()
        ms = self._costs.decode_ms(at, len(step.sequences))
        if at < len(self._stages) - 1:
            return ms, ()
        samples = tuple(Sample(s, stage.fed[s], (31 * stage.fed[s]) % 250) for s in step.sequences)
        self._sampled |= {s.sequence: (s.position, s.token) for s in samples}
        return ms, samples


def _request(name: str, prompt: Sequence[int], tokens: int) -> Request:
    return Request(name, tuple(prompt), SamplingParams(), tokens, ignore_eos=True)


def simulate_one_user(costs: StageCosts, tokens: int, rounds: int) -> dict[str, float]:
    """Return one user's tokens per second over all rounds, as ``pipeline_rounds`` measures them, by their names."""
    ring, ms = SimulatedRing(costs), defaultdict[str, float](float)
    for number in range(1, 1 + rounds):
        prompt = fresh_prompt(f"one user {number}", PROMPT)
        for rate in (None, *RATES):
            name = f"off-{number}" if rate is None else f"replay-{rate:g}-{number}"
            (came,) = ring.run(_request(name, prompt, tokens + 1))
            ms[rate_name(rate)] += came[-1] - came[0]
    return {name: 1e3 * tokens * rounds / total for name, total in ms.items()}


def simulate_users(costs: StageCosts, users: int, tokens: int) -> float:
    """Return the tokens per second of several users together, while all of them decode."""
    requests = [
        _request(f"user-{user}", fresh_prompt(f"user {user}", USERS_PROMPT), 4 * tokens) for user in range(users)
    ]
    came = SimulatedRing(costs).run(*requests)
    began, ended = max(each[0] for each in came), min(each[-1] for each in came)
    return 1e3 * sum(began < when <= ended for each in came for when in each) / (ended - began)


def simulate_prompt(costs: StageCosts, length: int) -> float:
    """Return the seconds to the first token of the last of several such prompts: the first ones teach their cost."""
    ring = SimulatedRing(costs)
    return [ring.run(_request(f"prompt-{i}", fresh_prompt(f"prompt {i}", length), 1))[0][0] for i in range(4)][-1] / 1e3


def fit_prompt(costs: StageCosts, length: int, compute_ms: Sequence[float]) -> StageCosts:
    """Return the costs with which the stages compute a prompt for ``compute_ms`` in all.

    That is what they were measured to need, but not in how many chunks. So the chunks are those of the simulation.
    """
    fitted = replace(costs, token_ms=[ms / length for ms in compute_ms])
    for _ in range(3):
        ring = SimulatedRing(fitted)
        for i in range(4):
            ring.chunks = 0
            ring.run(_request(f"prompt-{i}", fresh_prompt(f"prompt {i}", length), 1))
        fixed = [ring.chunks * ms for ms in costs.rows_ms[1]]
        least = [0.2 * ms for ms in compute_ms]
        rest = [max(ms - own, low) for ms, own, low in zip(compute_ms, fixed, least, strict=True)]
        fitted = replace(costs, token_ms=[ms / length for ms in rest])
    return fitted


def formula(costs: StageCosts, rate: float) -> float:
    """Return one user's tokens per second by the formula, with the best number of frames in flight."""
    windows = range(1, len(costs.token_ms) + 1)
    return 1e3 / min(mean_token_time(costs.lap, window, rate) for window in windows)


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--stages", type=float, nargs="+", default=[10.0] * 4, help="ms of a one-row frame, by stage")
    parser.add_argument("--row", type=float, default=0.9, help="cost of each further row, relative to the first")
    parser.add_argument("--token", type=float, default=0.03, help="cost of a prompt's token, relative to a row's frame")
    parser.add_argument("--hop", type=float, default=0.8, help="ms of a message")
    parser.add_argument("--users", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    rows = {rows: [ms * (1 + asked.row * (rows - 1)) for ms in asked.stages] for rows in (1, 2)}
    costs = StageCosts(rows, [asked.token * ms for ms in asked.stages], asked.hop)
    found = simulate_one_user(costs, asked.tokens, asked.rounds)
    found |= {f"decode{users}": simulate_users(costs, users, asked.tokens) for users in asked.users}
    found |= {f"ttft_{length}": simulate_prompt(costs, length) for length in asked.lengths}
    expected = {f"formula_at_{rate:g}".replace(".", "_"): formula(costs, rate) for rate in RATES}
    print_figures("simulated", [], found | expected, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
