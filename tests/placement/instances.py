"""Random models and workers for the planner, and a brute-force planner to compare it with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, permutations

from hypothesis import strategies as st

from cluster.core.limits import MEMORY_MARGIN
from cluster.core.plan import LayerRange, Link, ModelRef, ModelShape, Profile, SharedWeight
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.memory_split import WorkerMemory, needed_bytes
from cluster.placement.predicted_step_time import boundary_bytes, decode_s

Layout = tuple[tuple[Candidate, ...], tuple[LayerRange, ...]]
PROFILES = st.builds(
    Profile,
    bandwidth=st.floats(1e3, 1e5),
    layer_s=st.floats(0, 0.01),
    step_s=st.floats(0, 0.02),
    corrections=st.just(()) | st.just((("f", 1.5),)),
)
LINKS = st.builds(Link, round_trip_s=st.floats(0, 0.02), bandwidth=st.floats(1e3, 1e6))


@st.composite
def shapes(draw: st.DrawFn, most: int = 6) -> ModelShape:
    n = draw(st.integers(1, most))
    sizes = st.lists(st.integers(1, 100), min_size=n, max_size=n)
    layers = draw(sizes)
    active = tuple(draw(st.integers(1, size)) for size in layers)
    sparse = draw(st.booleans())
    experts = tuple(draw(st.integers(whole - read, whole)) for whole, read in zip(layers, active, strict=True))
    bad = draw(st.sets(st.integers(1, most), max_size=2))
    last = n - 1
    embedding = SharedWeight("embed", draw(st.integers(1, 60)), tuple({0, last}), 1, draw(st.booleans()))
    norm = SharedWeight("norm", draw(st.integers(1, 9)), (last,))
    return ModelShape(
        model=ModelRef("m", "", "f"),
        layers=n,
        layer_bytes=tuple(layers),
        cache_bytes=tuple(draw(sizes)),
        shared=(embedding, norm),
        clean_cuts=tuple(e for e in range(1, n) if e not in bad),
        unclean=tuple((e, "tied") for e in sorted(bad) if e < n),
        max_context=8,
        active_bytes=active,
        expert_bytes=experts if sparse else (),
        boundary_bytes=tuple(draw(sizes)),
    )


@st.composite
def clusters(draw: st.DrawFn, most: int = 4) -> Candidates:
    n = draw(st.integers(1, most))
    kinds = draw(st.lists(st.tuples(st.integers(30, 900), PROFILES), min_size=1, max_size=n))
    chosen = [draw(st.sampled_from(kinds)) for _ in range(n)]
    workers = [Candidate(WorkerMemory(f"w{i}", size), profile) for i, (size, profile) in enumerate(chosen)]
    pairs = [(a.name, b.name) for a, b in permutations(workers, 2)] if draw(st.booleans()) else []
    return Candidates(workers, {pair: draw(LINKS) for pair in pairs}, draw(LINKS), draw(st.booleans()))


def layouts(shape: ModelShape, candidates: Candidates) -> Iterator[Layout]:
    """Every order of every subset, every clean cut, that fits."""
    for count in range(1, len(candidates.workers) + 1):
        for chosen in combinations(shape.clean_cuts, count - 1):
            ranges = tuple(LayerRange(a, b) for a, b in pairwise((0, *chosen, shape.layers)))
            for workers in permutations(candidates.workers, count):
                if all(fits(shape, w, r) for w, r in zip(workers, ranges, strict=True)):
                    yield workers, ranges


def fits(shape: ModelShape, worker: Candidate, layers: LayerRange) -> bool:
    return needed_bytes(shape, layers, 1) <= int(worker.memory.nbytes * (1 - MEMORY_MARGIN))


def stages_s(shape: ModelShape, layout: Layout) -> list[float]:
    return [decode_s(shape, w.profile, r) for w, r in zip(*layout, strict=True)]


def total_s(shape: ModelShape, candidates: Candidates, layout: Layout) -> float:
    workers, ranges = layout
    hops = sum(
        candidates.hop_s(a, b, boundary_bytes(shape, r.start))
        for (a, b), r in zip(pairwise(workers), ranges[1:], strict=True)
    )
    return sum(stages_s(shape, layout)) + hops
