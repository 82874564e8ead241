"""What training is estimated to need beside the weights, and what is refused."""

from __future__ import annotations

import pytest

from cluster.core.errors import DoesNotFit
from cluster.core.limits import GIB
from cluster.core.plan import LayerRange, ModelRef, ModelShape, Objective, Plan, PlannedStage, Route, StageSpec
from cluster.core.training import TrainingOptions
from cluster.placement.training_memory import require_room, training_bytes

REF = ModelRef("large", "/large", "f" * 64)
LAYERS = 80
LARGE = ModelShape(
    REF, LAYERS, (10**9,) * LAYERS, (0,) * LAYERS, (), tuple(range(1, LAYERS)), (), 4096,
    flops=(1.7e9,) * LAYERS, boundary_bytes=(4, *[16384] * (LAYERS - 1)), vocabulary=128_000, heads=64,
)  # fmt: skip


def plan(room: int) -> Plan:
    stages = tuple(
        PlannedStage(StageSpec(1, i, 2, REF, LayerRange(40 * i, 40 * i + 40), 4096), name, 40 * 10**9, room, 0.0)
        for i, name in enumerate(("ada", "bob"))
    )
    return Plan(1, REF, stages, Route.DIRECT, 4096, 1, 2, 1, Objective.THROUGHPUT, None, (), ())


def options(**more: object) -> TrainingOptions:
    return TrainingOptions.of({"train": True, "num_layers": -1, "batch_size": 2, **more})


def test_recomputing_needs_much_less_and_longer_sequences_more_than_their_share() -> None:
    half = LayerRange(0, 40)
    plain = training_bytes(LARGE, half, 2, 1024, 3, recompute=False)
    lean = training_bytes(LARGE, half, 2, 1024, 3, recompute=True)
    assert 100 * GIB < plain < 200 * GIB
    assert lean < plain / 20
    assert training_bytes(LARGE, half, 2, 2048, 3, recompute=False) > 2 * plain
    assert (
        training_bytes(ModelShape(REF, 1, (1,), (0,), (), (), (), 256), LayerRange(0, 1), 2, 64, 1, recompute=True) == 0
    )


def test_what_does_not_fit_is_refused_with_the_figures_and_what_to_do() -> None:
    why = r"2 sequences of 1024 tokens at a time needs about \d+\.\d GiB .* on ada .* 24\.0 GiB left; .* --grad"
    with pytest.raises(DoesNotFit, match=why):
        require_room(plan(24 * GIB), LARGE, options(), 1024)
    require_room(plan(24 * GIB), LARGE, options(grad_checkpoint=True), 1024)
    require_room(plan(24 * GIB), LARGE, options(num_layers=16), 256)
    with pytest.raises(DoesNotFit, match=r"on bob .* lower --batch-size or --max-seq-length, or"):
        require_room(plan(24 * GIB), LARGE, options(num_layers=16, batch_size=64), 1024)


def test_micro_batches_need_the_memory_of_those_that_are_on_their_way() -> None:
    """The first stage has three of eight micro-batches of one sequence at once, 57 GiB, and both of two of four."""
    with pytest.raises(DoesNotFit, match=r"with 1 sequence of 1024 tokens at a time .* lower --max-seq-length, or"):
        require_room(plan(56 * GIB), LARGE, options(batch_size=8, micro_batches=8), 1024)
    require_room(plan(58 * GIB), LARGE, options(batch_size=8, micro_batches=8), 1024)
    for more in ({}, {"micro_batches": 2}):
        with pytest.raises(DoesNotFit):
            require_room(plan(152 * GIB), LARGE, options(batch_size=8, **more), 1024)
