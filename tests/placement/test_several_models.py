"""Several models on the same Macs: what brute force finds, the most important first, and no byte counted twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.limits import BALANCE_SLACK, GIB, SPEED_NOISE_RATIO
from cluster.core.plan import LayerRange, ModelShape, Profile
from cluster.placement.arrangement import LoadedModel, ModelDemand, ModelPlace
from cluster.placement.candidates import Candidates
from cluster.placement.memory_split import needed_bytes
from cluster.placement.propose import PlanRequest, propose
from cluster.placement.several_models import JointPlacement, LeftOut, place_models
from effort import effort
from placement.instances import Layout, clusters, layouts, shapes, total_s
from placement.test_propose import FAST, SLOW, mac, shape

Taken = dict[str, int]


@st.composite
def crowds(draw: st.DrawFn) -> list[ModelDemand]:
    """Return a model of several layers and up to two that cannot be cut, some of them pinned, on up to three Macs."""
    candidates = draw(clusters(most=3))
    models = [draw(shapes(most=4)), *(draw(shapes(most=1)) for _ in range(draw(st.integers(1, 2))))]
    return [
        ModelDemand(name, one, candidates, PlanRequest(), draw(st.booleans()), draw(st.sampled_from((0, 0, 5))))
        for name, one in zip("abc", models, strict=False)
    ]


def ranked(demands: Sequence[ModelDemand]) -> list[ModelDemand]:
    return sorted(demands, key=lambda one: -one.priority)


def usable(demand: ModelDemand) -> Taken:
    return {w.name: w.memory.usable for w in demand.candidates.workers}


def uses(model: ModelShape, layout: Layout) -> Taken:
    return {w.name: needed_bytes(model, r, 1) for w, r in zip(*layout, strict=True)}


def fit_together(memory: Taken, every: Sequence[Taken]) -> bool:
    return all(sum(one.get(name, 0) for one in every) <= nbytes for name, nbytes in memory.items())


def joint_layouts(demands: Sequence[ModelDemand]) -> Iterator[tuple[Layout, ...]]:
    """Yield every way to place all the models at once."""
    for found in product(*(list(layouts(one.shape, one.candidates)) for one in demands)):
        if fit_together(usable(demands[0]), [uses(d.shape, one) for d, one in zip(demands, found, strict=True)]):
            yield found


def used(place: ModelPlace) -> Taken:
    return {name: need.least for name, need in place.needs.items()}


@pytest.mark.timeout(300)
@settings(max_examples=effort(120, 1500, 30), deadline=None)
@given(crowds())
def test_all_that_must_fit_fits_if_it_can_and_the_first_is_as_fast_as_that_allows(demands: list[ModelDemand]) -> None:
    made = place_models(demands)
    first = ranked(demands)[0]
    musts = [one for one in ranked(demands) if one is first or one.pinned]
    every = list(joint_layouts(musts))
    together = all(made.find(one.name) for one in musts)
    assert together == bool(every)
    assert fit_together(usable(first), [used(place) for place in made.placed])
    place = made.find(first.name)
    assert (place is None) == (not list(layouts(first.shape, first.candidates)))
    if together and place:
        ends = first.candidates.ends_s()
        least = min(total_s(first.shape, first.candidates, one[0]) + ends for one in every)
        assert place.cost_s <= least * (1 + BALANCE_SLACK) * SPEED_NOISE_RATIO**2 * (1 + 1e-9)
        alone = propose(first.shape, first.candidates, first.request).forecast
        if first.name not in made.moved and alone:
            assert 1 / place.cost_s == pytest.approx(alone.one_user, rel=1e-4)


@pytest.mark.timeout(300)
@settings(max_examples=effort(120, 1500, 30), deadline=None)
@given(crowds())
def test_what_is_left_out_fits_nowhere_and_is_told_what_it_waits_for(demands: list[ModelDemand]) -> None:
    made = place_models(demands)
    memory = usable(demands[0])
    for one in made.left_out:
        others = [used(place) for place in made.placed]
        everywhere = [uses(one.demand.shape, found) for found in layouts(one.demand.shape, one.demand.candidates)]
        if one.demand is not ranked(demands)[0] and not one.demand.pinned:
            assert not any(fit_together(memory, [*others, own]) for own in everywhere)
        pinned = [used(place) for place in made.placed if place.demand.pinned]
        assert bool(one.unload) == any(fit_together(memory, [*pinned, own]) for own in everywhere)
        if one.place:
            staying = [used(place) for place in made.placed if place.name not in one.unload]
            assert fit_together(memory, [*staying, used(one.place)])
        assert one.fits_alone == bool(everywhere)


@pytest.mark.timeout(300)
@settings(max_examples=effort(120, 1500, 30), deadline=None)
@given(crowds())
def test_shares_hold_what_each_needs_and_leave_room_for_what_comes_by_turns(demands: list[ModelDemand]) -> None:
    made = place_models(demands)
    memory = usable(demands[0])
    assert set(made.shares) == {place.name for place in made.placed}
    assert fit_together(memory, list(made.shares.values()))
    for place in made.placed:
        assert all(made.shares[place.name][name] >= need for name, need in used(place).items())
    for one in made.left_out:
        if one.place:
            staying = [shares for name, shares in made.shares.items() if name not in one.unload]
            assert fit_together(memory, [*staying, used(one.place)])


def gib(model: ModelShape, name: str) -> ModelShape:
    return replace(model, model=replace(model.model, name=name))


def crowd(candidates: Candidates, *models: tuple[str, int, bool]) -> list[ModelDemand]:
    """Return models of so many layers of 1 GiB."""
    return [
        ModelDemand(name, gib(shape(layers), name), candidates, PlanRequest(), pinned)
        for name, layers, pinned in models
    ]


def where(made: JointPlacement) -> dict[str, tuple[str, ...]]:
    return {place.name: place.macs for place in made.placed}


def test_a_small_model_goes_to_a_mac_that_the_large_one_leaves_free_though_it_is_slower() -> None:
    candidates = Candidates([mac("fast", 100), mac("slow", 30, SLOW)])
    made = place_models(crowd(candidates, ("large", 40, False), ("small", 10, False)))
    assert where(made) == {"large": ("fast",), "small": ("slow",)}
    assert (made.moved, made.left_out) == ({}, ())


def test_else_it_goes_where_the_large_one_computes_least() -> None:
    candidates = Candidates([mac("fast", 90), mac("slow", 90, SLOW)])
    large, small = crowd(candidates, ("large", 60, False), ("small", 5, False))
    made = place_models([replace(large, request=PlanRequest(stage_count=2)), small])
    shares = made.placed[0].step_shares
    assert where(made)["small"] == (min(shares, key=lambda name: shares[name]),) == ("slow",)


def test_of_macs_that_are_equally_busy_it_takes_the_one_with_the_most_room() -> None:
    made = place_models(crowd(Candidates([mac("one", 60), mac("two", 90)]), ("large", 100, False), ("small", 5, False)))
    assert set(where(made)["large"]) == {"one", "two"}
    assert where(made)["small"] == ("two",)


def test_a_pinned_model_makes_room_for_itself_and_another_one_does_not() -> None:
    """One of them fits on the fast Mac alone, which the large one would like to have."""
    candidates = Candidates([mac("fast", 60), mac("slow", 40, SLOW)])
    apart = crowd(candidates, ("large", 30, False), ("other", 40, False))
    made = place_models(apart)
    assert where(made) == {"large": ("fast",), "other": ("slow", "fast")}
    uncut = replace(apart[1], request=PlanRequest(stage_count=1))
    turns = place_models([apart[0], uncut])
    assert where(turns) == {"large": ("fast",)}
    assert [(one.demand.name, one.unload) for one in turns.left_out] == [("other", ("large",))]
    pinned = place_models([apart[0], replace(uncut, pinned=True)])
    assert where(pinned) == {"large": ("slow", "fast"), "other": ("fast",)}
    assert pinned.moved == {"large": made.placed[0].cost_s}


def test_the_higher_priority_comes_first_and_what_is_pinned_is_not_unloaded() -> None:
    candidates = Candidates([mac("only", 60)])
    first, second = crowd(candidates, ("first", 40, False), ("second", 40, False))
    assert where(place_models([first, second])) == {"first": ("only",)}
    made = place_models([first, replace(second, priority=1, pinned=True)])
    assert where(made) == {"second": ("only",)}
    assert made.left_out == (LeftOut(first),)
    (huge,) = crowd(candidates, ("huge", 90, False))
    assert place_models([first, huge]).left_out == (LeftOut(huge, fits_alone=False),)


def test_residents_stay_where_they_are() -> None:
    candidates = Candidates([mac("fast", 60), mac("slow", 60, SLOW)])
    loaded = LoadedModel("loaded", {"fast": 30 * GIB}, {"fast": 1.0})
    made = place_models(crowd(candidates, ("next", 20, False)), [loaded])
    assert where(made) == {"next": ("slow",)}
    assert made.shares["next"] == {"slow": candidates.workers[1].memory.usable}
    beside = place_models(crowd(Candidates(candidates.workers[:1]), ("next", 20, False)), [loaded])
    assert beside.shares["next"] == {"fast": candidates.workers[0].memory.usable - 30 * GIB}
    too_large = place_models(crowd(Candidates(candidates.workers[:1]), ("next", 40, False)), [loaded])
    assert [one.unload for one in too_large.left_out] == [("loaded",)]


def test_macs_of_unknown_speed_hold_the_first_by_memory_and_the_next_on_one() -> None:
    candidates = Candidates([mac("a", 40, Profile()), mac("b", 60, Profile())])
    made = place_models(crowd(candidates, ("large", 40, False), ("small", 10, False)))
    assert [str(r) for r in made.placed[0].ranges] == ["0-15", "16-39"]
    assert where(made)["small"] == ("a",), "it computes fewer layers of the large one"
    assert made.placed[1].ranges == (LayerRange(0, 10),)


def test_many_macs_and_pinned_models_are_a_bounded_search() -> None:
    """Five models that must all be there, on six different Macs."""
    macs = [mac(f"m{i}", 30 + i, replace(FAST, bandwidth=FAST.bandwidth * (1 + i))) for i in range(6)]
    names = ("a", "b", "c", "d", "e")
    made = place_models(crowd(Candidates(macs), *((name, 30, True) for name in names)))
    assert set(where(made)) == set(names)
