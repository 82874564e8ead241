"""The split by memory is the best one, and what does not fit is refused with figures."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.core.errors import DoesNotFit, NoPlan
from cluster.core.limits import GIB
from cluster.core.plan import LayerRange, ModelRef, ModelShape, SharedWeight
from cluster.placement.memory_split import WorkerMemory, needed_bytes, require_fit, solve

MODEL = ModelRef("m", "", "")


def shape(layer_bytes: list[int], unclean: tuple[int, ...] = (), shared: tuple[SharedWeight, ...] = ()) -> ModelShape:
    n = len(layer_bytes)
    return ModelShape(
        model=MODEL,
        layers=n,
        layer_bytes=tuple(layer_bytes),
        cache_bytes=(1,) * n,
        shared=shared,
        clean_cuts=tuple(e for e in range(1, n) if e not in unclean),
        unclean=tuple((e, "layers 0 feed layers after the cut") for e in unclean),
        max_context=8,
    )


def fullness(s: ModelShape, memories: list[WorkerMemory], ranges: tuple[LayerRange, ...]) -> float:
    return max(needed_bytes(s, r, 1) / memory.usable for r, memory in zip(ranges, memories, strict=True))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.lists(st.integers(500, 900), min_size=1, max_size=4),
    st.sets(st.integers(1, 7), max_size=3),
)
def test_no_other_cut_leaves_the_fullest_worker_emptier(layers: list[int], sizes: list[int], bad: set[int]) -> None:
    tied = SharedWeight("embed", 9, (0, len(layers) - 1))
    s = shape(layers, tuple(sorted(e for e in bad if e < len(layers))), (tied,))
    memories = [WorkerMemory(f"w{i}", size) for i, size in enumerate(sizes)]
    assume(len(s.clean_cuts) >= len(memories) - 1)
    found = solve(s, memories, 1)
    bounds = [(0, *cuts, s.layers) for cuts in combinations(s.clean_cuts, len(memories) - 1)]
    every = [tuple(LayerRange(a, b) for a, b in pairwise(c)) for c in bounds]
    assert found in every
    assert fullness(s, memories, found) == min(fullness(s, memories, other) for other in every)


def test_bigger_macs_get_more_layers() -> None:
    found = solve(shape([100] * 12), [WorkerMemory("a", 1000), WorkerMemory("b", 2000)], 1)
    assert found == (LayerRange(0, 4), LayerRange(4, 12))


def test_a_shorter_context_is_advised_only_where_the_weights_fit() -> None:
    long = replace(shape([GIB] * 4), cache_bytes=(2 * GIB,) * 4)
    with pytest.raises(DoesNotFit, match=r"add a worker, raise --memory-limit, or lower --max-context$"):
        solve(long, [WorkerMemory("a", 8 * GIB)], 1)
    with pytest.raises(DoesNotFit, match=r"; add a worker, or raise --memory-limit$"):
        solve(long, [WorkerMemory("a", 3 * GIB)], 1)
    with pytest.raises(DoesNotFit, match=r"; add a worker$"):
        solve(long, [WorkerMemory("a", 3 * GIB, adjustable=False)], 1)


def test_what_does_not_fit_is_refused_with_the_gib_missing() -> None:
    with pytest.raises(DoesNotFit, match=r"needs 40 GiB .* offer 19 GiB; a lacks 10.5 GiB; b lacks 10.5 GiB"):
        solve(shape([GIB] * 40), [WorkerMemory("a", 10 * GIB), WorkerMemory("b", 10 * GIB)], 1)


def test_too_few_cuts_say_how_many_workers_would_do() -> None:
    with pytest.raises(NoPlan, match="cut into 2 stages at most, not 3; use --workers 2"):
        solve(shape([1] * 4, unclean=(1, 3)), [WorkerMemory(n, 1000) for n in "abc"], 1)


def test_given_layers_obey_the_same_rules() -> None:
    memories = [WorkerMemory("a", 1000), WorkerMemory("b", 1000)]
    s = shape([1] * 4, unclean=(1,))
    require_fit(s, memories, (LayerRange(0, 2), LayerRange(2, 4)), 1)
    with pytest.raises(NoPlan, match=r"cannot be cut before layer 1: layers 0 feed .* before 2, 3"):
        require_fit(s, memories, (LayerRange(0, 1), LayerRange(1, 4)), 1)
    with pytest.raises(NoPlan, match="layers 0-3, but the ranges end at layer 2"):
        require_fit(s, memories, (LayerRange(0, 2), LayerRange(2, 3)), 1)
