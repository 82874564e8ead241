"""From a model's shape to a plan and its capacity: lanes, rows, and cache sizes from the curve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.planner import capacity, full_contexts, leave_room, make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit, InvalidOption, NoPlan
from cluster.core.lap_times import LapTimes
from cluster.core.limits import LANE_ROWS, MEMORY_MARGIN, PREFILL_CHUNK, PREFIX_SHARE
from cluster.core.plan import LayerRange, ModelRef, ModelShape, Profile, Speculation
from cluster.core.worker import WorkerInfo
from cluster.placement.predicted_step_time import decode_s
from cluster.scheduler.verify_length import choose_depth

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


def test_caches_limited_to_some_contexts_leave_memory_to_other_models() -> None:
    two = [worker("a", 1000), worker("b", 1000)]
    plan = make_plan(7, SHAPE, two, replace(ORDER, worker_count=2, cached_contexts=3))
    assert [s.cache_bytes for s in plan.stages] == [300, 300], "three contexts of two layers"
    assert plan.max_sequences == 3
    full = make_plan(7, SHAPE, two, replace(ORDER, cached_contexts=10**6))
    assert [s.cache_bytes for s in full.stages] == [s.cache_bytes for s in make_plan(7, SHAPE, two, ORDER).stages]
    small = make_plan(7, SHAPE, two, replace(ORDER, worker_count=1, cached_contexts=1))
    assert [(s.weight_bytes, s.cache_bytes) for s in small.stages] == [(400, 200)]


def test_caches_leave_equal_parts_to_models_that_are_yet_to_come() -> None:
    two = [worker("a", 1000), worker("b", 1000)]
    order = replace(ORDER, worker_count=2)
    plan = make_plan(7, SHAPE, two, order)
    room = full_contexts(plan.stages, SHAPE)
    assert leave_room(plan, SHAPE, order, 0) == (plan, order), "alone it has all"
    shared, narrowed = leave_room(plan, SHAPE, order, 1)
    assert narrowed == replace(order, cached_contexts=room // 2)
    assert shared == make_plan(7, SHAPE, two, narrowed), "a recovery keeps to the same share"
    assert [s.cache_bytes for s in leave_room(plan, SHAPE, order, 50)[0].stages] == [100, 100], "one full context"
    chosen = replace(order, cached_contexts=3)
    assert leave_room(plan, SHAPE, chosen, 1) == (plan, chosen)


def test_caches_that_cannot_batch_get_lanes_of_one() -> None:
    plan = make_plan(7, replace(SHAPE, batchable=False), [worker("a", 10**6)], replace(ORDER, lanes=3))
    assert (plan.lanes, plan.rows, plan.max_sequences) == (3, 1, 3)
    assert "requests to m cannot share a batch in mlx-lm: every lane takes one request" in plan.reasons[-1]
    quantized = make_plan(7, replace(SHAPE, batchable=False), [worker("a", 10**6)], replace(ORDER, kv_bits=4))
    assert quantized.reasons[-1].startswith("caches of 4 bits cannot share a batch in mlx-lm")
    assert not any("share a batch" in reason for reason in make_plan(7, SHAPE, [worker("a", 10**6)], ORDER).reasons)


def test_short_sequences_are_charged_little() -> None:
    plan = make_plan(7, SHAPE, [worker("a", 1000), worker("b", 1000)], ORDER)
    limits = capacity(plan, SHAPE, ORDER, ())
    assert [limits.cost_of(n) for n in (1, 10, 11, 100, 101, 1000)] == [(2, 2)] * 2 + [(12, 12)] * 2 + [(100, 100)] * 2
    assert limits.prefix_budget == tuple(int(b * PREFIX_SHARE) for b in limits.budget)
    assert limits.why_never_fits(1000) == ""


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
        return capacity(plan, shape, ORDER, ()).max_chunk(context)

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
    limits = capacity(plan, SHAPE, replace(ORDER, prefill_chunk=96), ())
    assert (limits.chunk, limits.max_chunk(5), limits.fixed_chunk) == (96, 96, True)
    limits = capacity(plan, SHAPE, ORDER, ())
    assert (limits.chunk, limits.max_chunk(5), limits.fixed_chunk) == (PREFILL_CHUNK, PREFILL_CHUNK, False)


DENSE = replace(SHAPE, layer_bytes=(10**10,) * 4, cache_bytes=(10**8,) * 4, cache_curve=())
SPARSE = replace(DENSE, active_bytes=(10**9,) * 4, expert_bytes=(9_800_000_000,) * 4)
M5_MAX = ((2, 1.05), (3, 1.11), (5, 1.45), (8, 2.2))
"""Steps of several tokens, as recorded: of a 70B with 4-bit weights; two tokens are in between."""
CPU = ((2, 1.97), (3, 2.93), (4, 3.86), (8, 7.7))
H200 = ((2, 2.65), (3, 3.5), (4, 4.3), (5, 5.4), (6, 5.8), (8, 2.5))


def row_costs(shape: ModelShape, *curves: tuple[tuple[int, float], ...], exact: bool = False) -> dict[int, list[float]]:
    """Return the costs of rows on stages whose workers have measured these."""
    profiles = [Profile(4e11, 1e-5, 1e-4, 1e13, verify_costs=curve) for curve in curves]
    workers = [replace(worker(f"w{i}", 10**11), profile=profile) for i, profile in enumerate(profiles)]
    order = replace(ORDER, exact=exact, speculation=Speculation.NGRAM, worker_count=len(workers))
    plan = make_plan(7, shape, workers, order)
    return {tokens: list(costs) for tokens, costs in capacity(plan, shape, order, workers).verify_costs.items()}


def chosen_tokens(shape: ModelShape, *curves: tuple[tuple[int, float], ...]) -> int:
    """Return the tokens of a frame where seven of ten guesses are right."""
    seconds = decode_s(shape, Profile(4e11, 1e-5, 1e-4, 1e13), LayerRange(0, 4 // len(curves)))
    steps = {1: LapTimes((seconds,) * len(curves), 0.001)}
    for tokens, costs in row_costs(shape, *curves).items():
        steps[tokens] = LapTimes(tuple(cost * seconds for cost in costs), 0.001)
    return choose_depth(steps, 0.7, len(curves)).tokens


def test_rows_cost_what_every_worker_has_measured() -> None:
    costs = row_costs(DENSE, M5_MAX, M5_MAX)
    assert set(costs) == {2, 3, 5, 8}
    assert costs[3] == [pytest.approx(1.11, abs=0.01)] * 2
    assert set(row_costs(DENSE, M5_MAX, CPU)) == {2, 3, 8}
    assert row_costs(DENSE, M5_MAX, ()) == {}


def test_rows_need_caches_that_can_be_trimmed_and_an_operator_who_allows_them() -> None:
    assert row_costs(DENSE, M5_MAX, exact=True) == {}
    assert row_costs(replace(DENSE, trimmable=False, mark_curve=((1000, (1,) * 4),)), M5_MAX) == {}
    with pytest.raises(InvalidOption, match="--exact off needs guesses: add --speculate"):
        replace(ORDER, exact=False).check()
    replace(ORDER, exact=False, speculation=Speculation.NGRAM).check()


@pytest.mark.parametrize("stages", [1, 2])
def test_frames_have_several_tokens_only_where_such_rows_are_cheap(stages: int) -> None:
    assert chosen_tokens(DENSE, *[M5_MAX] * stages) == 3
    assert chosen_tokens(DENSE, *[CPU] * stages) == 1
    assert chosen_tokens(DENSE, *[H200[:-1]] * stages) == 1


def test_each_row_of_a_mixture_reads_experts_of_its_own() -> None:
    """On one Mac, where nothing overlaps, two rows still gain a little. On two, frames of one token are faster."""
    assert row_costs(SPARSE, M5_MAX)[3] == [pytest.approx(2.36, abs=0.01)]
    assert [chosen_tokens(SPARSE, *[M5_MAX] * stages) for stages in (1, 2)] == [2, 1]


def test_where_eight_rows_are_cheaper_than_three_eight_are_taken() -> None:
    """If nothing overlaps. On two stages, frames of one token are faster."""
    assert [chosen_tokens(DENSE, *[H200] * stages) for stages in (1, 2)] == [8, 1]
