"""From a model's shape to a plan and its capacity: lanes, rows, and cache sizes from the curve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.planner import capacity, make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit, InvalidOption, NoPlan
from cluster.core.limits import LANE_ROWS, MEMORY_MARGIN, PREFILL_CHUNK, PREFIX_SHARE
from cluster.core.plan import LayerRange, ModelRef, ModelShape
from cluster.core.worker import WorkerInfo

MODEL = ModelRef("m", "/m", "f")
SHAPE = ModelShape(
    model=MODEL,
    layers=4,
    layer_bytes=(100,) * 4,
    cache_bytes=(50,) * 4,
    shared=(),
    clean_cuts=(1, 2, 3),
    unclean=(),
    max_context=1000,
    cache_curve=((10, (1, 1, 1, 1)), (100, (6, 6, 6, 6))),
)
ORDER = LoadOrder("m")


def worker(name: str, memory: int) -> WorkerInfo:
    return WorkerInfo(name, name, "", "", "", "", "", "", memory, memory)


def test_a_plan_has_a_lane_for_each_stage_and_room_for_what_memory_holds() -> None:
    plan = make_plan(7, SHAPE, [worker("a", 1000), worker("b", 1000)], ORDER)
    assert [(s.worker, s.layers, s.weight_bytes) for s in plan.stages] == [
        ("a", LayerRange(0, 2), 200),
        ("b", LayerRange(2, 4), 200),
    ]
    left = int(1000 * (1 - MEMORY_MARGIN)) - 200
    assert [s.cache_bytes for s in plan.stages] == [left, left]
    assert (plan.lanes, plan.rows, plan.max_sequences) == (2, LANE_ROWS, left // 100)


def test_caches_that_cannot_batch_get_lanes_of_one() -> None:
    plan = make_plan(7, replace(SHAPE, batchable=False), [worker("a", 10**6)], replace(ORDER, lanes=3))
    assert (plan.lanes, plan.rows, plan.max_sequences) == (3, 1, 3)
    assert "requests to m cannot share a batch in mlx-lm: every lane takes one request" in plan.reasons[-1]
    quantized = make_plan(7, replace(SHAPE, batchable=False), [worker("a", 10**6)], replace(ORDER, kv_bits=4))
    assert quantized.reasons[-1].startswith("caches of 4 bits cannot share a batch in mlx-lm")
    assert not any("share a batch" in reason for reason in make_plan(7, SHAPE, [worker("a", 10**6)], ORDER).reasons)


def test_short_sequences_are_charged_little() -> None:
    plan = make_plan(7, SHAPE, [worker("a", 1000), worker("b", 1000)], ORDER)
    limits = capacity(plan, SHAPE, ORDER)
    assert [limits.cost_of(n) for n in (1, 10, 11, 100, 101, 1000)] == [(2, 2)] * 2 + [(12, 12)] * 2 + [(100, 100)] * 2
    assert limits.prefix_budget == tuple(int(b * PREFIX_SHARE) for b in limits.budget)
    assert limits.never_fits(1000) == ""


def test_what_cannot_be_is_refused() -> None:
    two = [worker("a", 1000), worker("b", 1000)]
    with pytest.raises(NoPlan, match="3 layer ranges were given, but there are 2 workers"):
        make_plan(7, SHAPE, two, replace(ORDER, layers=(LayerRange(0, 1), LayerRange(1, 2), LayerRange(2, 4))))
    with pytest.raises(InvalidOption, match="--lanes is 0"):
        make_plan(7, SHAPE, two, replace(ORDER, lanes=0))
    with pytest.raises(DoesNotFit, match=r"needs .* with 1 x 1000 tokens"):
        make_plan(7, SHAPE, [worker("a", 300), worker("b", 300)], ORDER)


def test_long_chunks_need_memory_that_the_stages_keep_free() -> None:
    shape = replace(SHAPE, flops=(2e6,) * 4, boundary_bytes=(0, 2000, 2000, 2000), heads=8, max_chunk=2048)

    order = replace(ORDER, layers=(LayerRange(0, 2), LayerRange(2, 4)))

    def longest(memory: int, context: int, shape: ModelShape = shape) -> int:
        plan = make_plan(7, shape, [worker("a", memory), worker("b", 10 * memory)], order)
        return capacity(plan, shape, ORDER).max_chunk(context)

    assert longest(10**11, 0) == 2048, "what the caches are sized for"
    assert longest(10**8, 0) == PREFILL_CHUNK, "what is usual needs no proof"
    wide, deep = longest(2 * 10**9, 0), longest(2 * 10**9, 1000)
    assert 2048 > wide > deep > PREFILL_CHUNK
    assert deep % 64 == 0
    scores, values = 4 * 8 * deep * (1000 + deep), deep * 2 * 5 * 2e6 / 2000
    assert scores + values <= 2 * 10**9 * MEMORY_MARGIN <= (scores + values) * 1.2
    assert longest(10**11, 0, replace(shape, heads=0)) == PREFILL_CHUNK, "unknown sizes"


def test_a_chunk_that_is_asked_for_is_used() -> None:
    plan = make_plan(7, SHAPE, [worker("a", 1000), worker("b", 1000)], ORDER)
    limits = capacity(plan, SHAPE, replace(ORDER, prefill_chunk=96))
    assert (limits.chunk, limits.max_chunk(5), limits.fixed_chunk) == (96, 96, True)
    limits = capacity(plan, SHAPE, ORDER)
    assert (limits.chunk, limits.max_chunk(5), limits.fixed_chunk) == (PREFILL_CHUNK, PREFILL_CHUNK, False)
