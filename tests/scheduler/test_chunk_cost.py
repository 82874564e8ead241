"""What chunks cost, as learned from those that came back, and how prompts are cut by it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from cluster.core.frames import Compute, StageTiming
from cluster.core.plan import chunks
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.chunk_cost import ChunkCost, ChunkCosts
from cluster.scheduler.prefill_budget import PrefillBudget

HOP_MS = 1.0


@dataclass(frozen=True)
class Machine:
    """Milliseconds on each stage: per chunk, per token, per pair of tokens; of experts, once every one is in use.

    ``new`` is what a chunk costs besides if none of its length was computed after as many tokens before.
    """

    chunk: float
    token: float
    pair: float
    experts: float = 0.0
    new: float = 0.0

    def took(self, context: int, tokens: int) -> float:
        experts = self.experts * (1 - 0.99**tokens)
        return self.chunk + experts + tokens * (self.token + self.pair * (context + tokens / 2))


DENSE = Machine(11, 0.3, 8e-6)
SLOW = Machine(30, 5.0, 1e-4)
MIXTURE = Machine(20, 0.3, 1e-5, experts=150)
ATTENTION = Machine(2, 0.05, 2e-5)
MACHINES = {"dense": DENSE, "slow": SLOW, "mixture": MIXTURE, "attention": ATTENTION}


class Pipeline:
    """Equal stages that read one prompt after the other, with up to one chunk more than there are stages."""

    def __init__(self, machine: Machine, stages: int, noise: float = 0.0, **limits: object) -> None:
        self.machine, self.stages, self.noise = machine, stages, noise
        self.random = random.Random(stages)
        self.met: set[tuple[int, int]] = set()
        settings = {"max_chunk": lambda context: 2048, **limits}
        none = (0,) * stages
        self.budget = PrefillBudget(Capacity(1, 1, stages + 1, none, none, lambda tokens: none, **settings))  # type: ignore[arg-type]

    def warm_up(self) -> Pipeline:
        """Read prompts of any length, as users send them."""
        for _ in range(12):
            self.read(self.random.randrange(200, 9000))
        return self

    def read(self, tokens: int, start: int = 0, pieces: Iterator[int] | None = None) -> tuple[list[int], float]:
        """Return the chunks of a prompt, and the milliseconds that it takes. ``pieces`` are other ones to use."""
        free, done, sent = [0.0] * self.stages, [0.0] * (self.stages + 1), []
        while sum(sent) < tokens:
            context, left = start + sum(sent), tokens - sum(sent)
            chosen = self.budget.chunk(start, context, left, others_decode=False)
            chunk = next(pieces) if pieces else chosen
            at, timings = done[len(sent)], []
            prepared = 0.0 if (context, chunk) in self.met else self.machine.new
            self.met.add((context, chunk))
            for stage in range(self.stages):
                ms = prepared + self.machine.took(context, chunk) * (1 + self.noise * self.random.random())
                at = free[stage] = max(free[stage], at + HOP_MS) + ms
                timings.append(StageTiming(stage, 0, round(ms * 1e3), 0))
            if not pieces:
                self.budget.learn(Compute.PREFILL, chunk, timings, context)
            sent.append(chunk)
            done.append(at)
        return sent, done[-1]


def gain(pipeline: Pipeline, tokens: int, start: int = 0) -> float:
    """Return the time of a prompt, relative to chunks of equal lengths up to 512."""
    usual = pipeline.read(tokens, start, iter(chunks(tokens, pipeline.stages)))[1]
    return pipeline.read(tokens, start)[1] / usual


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_costs_are_learned_from_chunks_of_several_lengths(noise: float) -> None:
    costs, rng = ChunkCosts(), random.Random(1)
    for _ in range(300):
        context, tokens = rng.randrange(20_000), rng.choice((64, 256, 512, 77))
        us = 1e3 * DENSE.took(context, tokens) * (1 + noise * (rng.random() - 0.5))
        costs.learn(context, tokens, us, 2 * us)
    found = costs.known
    assert found
    close = 1.6 if noise else 1.05  # noise moves it, but not past what is replaced
    assert DENSE.chunk + 1 == pytest.approx(found.fixed * found.token_us / 1e3, rel=close - 1)
    assert DENSE.token == pytest.approx(found.token_us / 1e3, rel=close - 1)
    assert DENSE.pair == pytest.approx(found.pair * found.token_us / 1e3, rel=close - 1)
    assert found.others == pytest.approx(2)


def test_chunks_of_one_length_tell_no_costs() -> None:
    costs = ChunkCosts()
    for _ in range(100):
        costs.learn(0, 512, 9e4, 0.0)
    assert costs.known is None


def test_large_changes_replace_the_cost() -> None:
    costs = ChunkCosts()

    def learn(factor: float) -> ChunkCost:
        for tokens in (64, 512, 256) * 100:
            costs.learn(0, tokens, 1e3 * factor * DENSE.took(0, tokens), 0.0)
        assert costs.known
        return costs.known

    assert learn(1).token_us == pytest.approx(300)
    assert learn(4).token_us == pytest.approx(1200, rel=0.5)


def test_small_changes_do_not_count() -> None:
    cost = ChunkCost(300.0, 40.0, 2e-5, 1.0)
    assert not ChunkCost(400.0, 70.0, 1.5e-5, 1.6).differs(cost)
    assert not ChunkCost(300.0, 40.0, 2e-5, 1.0).differs(cost)
    assert not ChunkCost(300.0, 7.0, 1e-6, 0.05).differs(ChunkCost(300.0, 0.0, 0.0, 0.0))
    assert all(
        other.differs(cost)
        for other in (
            ChunkCost(900.0, 40.0, 2e-5, 1.0),
            ChunkCost(300.0, 15.0, 2e-5, 1.0),
            ChunkCost(300.0, 40.0, 9e-5, 1.0),
            ChunkCost(300.0, 40.0, 2e-5, 3.0),
        )
    )


def test_what_cannot_be_measured_is_not_learned() -> None:
    costs = ChunkCosts()
    for tokens in (64, 512, 256) * 40:
        costs.learn(0, tokens, 0.0, 0.0)
        costs.learn(0, 0, 5.0, 0.0)
    assert costs.known is None
    for tokens in (64, 512, 256) * 40:
        costs.learn(0, tokens, 9e4, 0.0)  # any chunk takes as long as another
    assert costs.known
    assert costs.known.token_us > 0


@pytest.mark.parametrize("pair", [0.0, 1e-6, 4e-4])
def test_chunks_have_equal_cost_and_get_shorter_as_the_context_grows(pair: float) -> None:
    cost, start, whole = ChunkCost(50.0, 40.0, pair, 1.0), 5000, 32_000
    lengths = []
    while sum(lengths) < whole - 2:
        lengths.append(cost.even_chunk(start, whole, start + round(sum(lengths))))
    assert all(a >= b for a, b in pairwise(lengths))
    assert sum(lengths) == pytest.approx(whole, rel=1e-3)
    first, last = cost.work(start, round(lengths[0])), cost.work(start + whole - round(lengths[-1]), round(lengths[-1]))
    assert first == pytest.approx(last, rel=0.01)


def test_a_gpu_soon_knows_the_lengths_of_chunks() -> None:
    """A new length takes it longer than a chunk. Such times teach what is not so, but a few prompts later it is."""
    gpu = Machine(20, 0.24, 1e-6, new=66)
    pipeline, ideal = Pipeline(gpu, 4, noise=0.05), Pipeline(replace(gpu, new=0.0), 4, noise=0.05)
    for tokens in (2, 63, *(2047, 15, 15, 8191) * 6):
        pipeline.read(tokens)
        ideal.read(tokens)
    for tokens in (2047, 8191):
        assert pipeline.read(tokens)[1] < 1.05 * ideal.read(tokens)[1]


def test_chunks_have_few_lengths() -> None:
    pipeline = Pipeline(ATTENTION, 2).warm_up()
    lengths = {piece for tokens in range(300, 32_000, 1900) for piece in pipeline.read(tokens)[0][:-1]}
    assert all(length & (length - 1) == 0 for length in lengths), lengths


def test_a_prompts_chunks_become_shorter() -> None:
    pieces = Pipeline(ATTENTION, 2).warm_up().read(32_000)[0]
    assert pieces[0] >= 2 * pieces[-2]
    assert all(piece % 64 == 0 for piece in pieces[:-1])
    assert sum(pieces) == 32_000


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", MACHINES)
def test_cutting_by_cost_is_never_much_slower(name: str, stages: int) -> None:
    pipeline = Pipeline(MACHINES[name], stages, noise=0.1).warm_up()
    for tokens, start in ((300, 0), (2047, 0), (8191, 0), (32_000, 0), (1500, 16_000)):
        assert gain(pipeline, tokens, start) < 1.1


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_mixture_of_experts_gets_long_chunks(stages: int) -> None:
    pipeline = Pipeline(MIXTURE, stages).warm_up()
    assert max(pipeline.read(8191)[0]) > 512
    assert gain(pipeline, 8191) < 0.95


def test_a_dense_model_keeps_its_chunks() -> None:
    """Longer ones would leave the other stage idle for longer than they save."""
    assert max(Pipeline(DENSE, 2).warm_up().read(8191)[0]) <= 640
    assert max(Pipeline(SLOW, 1).warm_up().read(8191)[0]) == 512


def test_a_warm_turn_is_shared_by_the_stages() -> None:
    """A few hundred new tokens after a long context: two chunks of 128 would leave each stage idle for a third."""
    slow = Machine(1, 0.5, 2e-4)
    pipeline = Pipeline(slow, 2).warm_up()
    assert len(pipeline.read(280, 16_000)[0]) >= 4
    assert gain(pipeline, 280, 16_000) < 0.9


def test_memory_and_time_bound_long_chunks() -> None:
    assert max(Pipeline(MIXTURE, 1, max_chunk=lambda context: 1024).warm_up().read(8191)[0]) == 1024
    slow = Machine(3000, 3.0, 0.0)
    assert max(Pipeline(slow, 1).warm_up().read(8191)[0]) == 512, "2 s are over before a token is read"


def test_a_chunk_that_was_asked_for_is_used_whatever_it_costs() -> None:
    pipeline = Pipeline(MIXTURE, 2, chunk=700, max_chunk=lambda context: 700, fixed_chunk=True).warm_up()
    assert pipeline.read(2001)[0] == [700, 700, 601]


def test_equal_prompts_are_cut_alike() -> None:
    pipeline = Pipeline(DENSE, 2, noise=0.1).warm_up()
    pipeline.warm_up()
    assert len({tuple(pipeline.read(4001)[0]) for _ in range(10)}) == 1
