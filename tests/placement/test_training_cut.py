"""Where a model is cut for training: by the work of the way back, and by the workers' speeds."""

from __future__ import annotations

import pytest

from cluster.core.plan import ModelRef, ModelShape, SharedWeight
from cluster.placement.training_cut import cut_for_training, head_cost

EVERY = range(1, 12)


def ends(*arguments: object, recompute: bool = False) -> list[int]:
    layers, cuts, speeds, trained = arguments
    found = cut_for_training(layers, cuts, speeds, trained, recompute=recompute)  # type: ignore[arg-type]
    assert [r.start for r in found] == [0, *(r.end for r in found[:-1])]
    return [r.end for r in found]


@pytest.mark.parametrize(
    ("trained", "recompute", "expected"),
    [(12, False, [6, 12]), (4, False, [8, 12]), (4, True, [9, 12]), (2, False, [7, 12]), (2, True, [8, 12])],
)
def test_layers_that_train_weigh_more(trained: int, recompute: bool, expected: list[int]) -> None:
    assert ends(12, EVERY, [1.0, 1.0], trained, recompute=recompute) == expected


def test_a_faster_worker_gets_more_layers() -> None:
    assert ends(12, EVERY, [2.0, 1.0], 12) == [8, 12]
    assert ends(12, EVERY, [1.0, 1.0, 2.0], 12) == [3, 6, 12]


def test_a_head_weighs_as_many_layers_as_it_has_bytes() -> None:
    shared = (SharedWeight("embedding", 30, (0,)), SharedWeight("head", 40, (11,)))
    shape = ModelShape(ModelRef("m", "/m", "f"), 12, (20,) * 12, (0,) * 12, shared, tuple(EVERY), (), 256)
    assert head_cost(shape) == 2.0
    assert [r.end for r in cut_for_training(12, EVERY, [1.0, 1.0], 12, recompute=False, head=2.0)] == [7, 12]


def test_only_clean_cuts_are_used() -> None:
    assert ends(12, [3, 8], [1.0, 1.0], 12) == [8, 12]
    assert ends(12, [3], [1.0, 1.0, 1.0], 12) == [3, 12]
    assert ends(12, [], [1.0], 12) == [12]
