"""Which models leave memory for another one, against every other choice."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.coordinator.eviction import Resident, Room, find_room
from cluster.core.errors import DoesNotFit, ModelTooLarge
from cluster.core.load_limits import MIN_RESIDENT_S

NOW = 1000.0
GIB = 2**30


def needs(
    needed: dict[str, int], held: dict[str, int], free: int = 0
) -> Callable[[AbstractSet[str]], DoesNotFit | None]:
    """A model of one piece on one Mac, which needs so many bytes there."""

    def refusal(gone: AbstractSet[str]) -> DoesNotFit | None:
        missing = needed["new"] - free - sum(held[name] for name in gone)
        return DoesNotFit(f"new lacks {missing}", missing_bytes=str(missing)) if missing > 0 else None

    return refusal


def resident(name: str, used_ago: float, *, loaded_ago: float = 900.0, **state: bool | int) -> Resident:
    return Resident(name, NOW - used_ago, NOW - loaded_ago, **state)  # type: ignore[arg-type]


def test_the_least_recently_used_model_leaves_and_one_that_need_not_stays() -> None:
    residents = [resident("old", 300), resident("older", 400), resident("oldest", 500)]
    held = {"old": 4, "older": 1, "oldest": 2}
    assert find_room("new", residents, needs({"new": 0}, held), NOW) == Room()
    assert find_room("new", residents, needs({"new": 2}, held), NOW) == Room(("oldest",))
    assert find_room("new", residents, needs({"new": 3}, held), NOW) == Room(("oldest", "older"))
    assert find_room("new", residents, needs({"new": 4}, held), NOW) == Room(("old",))
    assert find_room("new", residents, needs({"new": 6}, held), NOW) == Room(("oldest", "old"))


def test_a_model_of_lower_priority_leaves_before_one_that_was_used_longer_ago() -> None:
    residents = [resident("first", 500, priority=1), resident("second", 10)]
    assert find_room("new", residents, needs({"new": 1}, {"first": 1, "second": 1}), NOW) == Room(("second",))


def test_what_was_just_loaded_stays_for_a_while() -> None:
    young = resident("young", 5, loaded_ago=10)
    younger = resident("younger", 2, loaded_ago=4)
    refusal = needs({"new": 1}, {"young": 1, "younger": 1})
    assert find_room("new", [young, younger], refusal, NOW) == Room(wait_s=MIN_RESIDENT_S - 10)
    both = needs({"new": 2}, {"young": 1, "younger": 1})
    assert find_room("new", [young, younger], both, NOW) == Room(wait_s=MIN_RESIDENT_S - 4)
    assert find_room("new", [young, resident("old", 400)], needs({"new": 1}, {"young": 1, "old": 1}), NOW) == Room(
        ("old",)
    )


def test_a_model_is_refused_beside_what_is_busy_or_pinned_with_names_and_gib() -> None:
    residents = [resident("chat", 0, busy=True), resident("title", 90, pinned=True), resident("idle", 90)]
    held = {"chat": 4 * GIB, "title": GIB, "idle": GIB}
    with pytest.raises(DoesNotFit) as refused:
        find_room("new", residents, needs({"new": 5 * GIB}, held), NOW)
    assert refused.value.sentence == (
        "new does not fit beside chat, which is busy, and title, which is pinned: it needs 4 GiB more; "
        "try again in a moment"
    )
    assert refused.value.retry_after_s
    assert not isinstance(refused.value, ModelTooLarge)


def test_trying_again_is_no_use_beside_what_is_pinned() -> None:
    residents = [resident("chat", 0, busy=True), resident("title", 90, pinned=True), resident("idle", 90)]
    refusal = needs({"new": 6 * GIB}, {"chat": 4 * GIB, "title": GIB, "idle": GIB})
    with pytest.raises(
        ModelTooLarge,
        match="beside title, which is pinned: it needs 1 GiB more; unload title first, or load it again with",
    ) as refused:
        find_room("new", residents, refusal, NOW)
    assert refused.value.retry_after_s is None
    with pytest.raises(DoesNotFit) as awaited:
        find_room("new", residents, refusal, NOW, lacks_macs=True)
    assert type(awaited.value) is DoesNotFit


@pytest.mark.parametrize(("lacks_macs", "kind"), [(False, ModelTooLarge), (True, DoesNotFit)])
def test_a_model_that_can_never_fit_has_the_planners_sentence(lacks_macs: bool, kind: type[DoesNotFit]) -> None:
    with pytest.raises(DoesNotFit, match=r"^new lacks 3$") as refused:
        find_room("new", [resident("chat", 0, busy=True)], needs({"new": 5}, {"chat": 2}), NOW, lacks_macs)
    assert type(refused.value) is kind
    assert refused.value.details["missing_bytes"] == "3"


residents_strategy = st.lists(
    st.builds(
        Resident,
        name=st.uuids().map(str),
        used_at=st.floats(0, NOW),
        loaded_at=st.floats(NOW - 2 * MIN_RESIDENT_S, NOW),
        busy=st.booleans(),
        pinned=st.booleans(),
        priority=st.integers(0, 2),
    ),
    max_size=6,
)


@given(
    residents_strategy,
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=6, max_size=6),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
)
def test_victims_suffice_and_none_could_stay(
    residents: list[Resident], sizes: list[tuple[int, int]], free: tuple[int, int], pieces: list[int]
) -> None:
    """Two Macs and a model in pieces, each of which must fit on one of them: sums of bytes do not decide."""
    held = {one.name: size for one, size in zip(residents, sizes, strict=False)}

    def refusal(gone: AbstractSet[str]) -> DoesNotFit | None:
        left, right = (free[mac] + sum(held[name][mac] for name in gone) for mac in (0, 1))
        on_left = (sum(part) for part in chain(*(combinations(pieces, n) for n in range(len(pieces) + 1))))
        fits = any(one <= left and sum(pieces) - one <= right for one in on_left)
        return None if fits else DoesNotFit("does not fit", missing_bytes="1")

    may_leave = {one.name for one in residents if not one.busy and not one.pinned}
    settled = {one.name for one in residents if one.name in may_leave and NOW - one.loaded_at >= MIN_RESIDENT_S}
    try:
        room = find_room("new", residents, refusal, NOW)
    except DoesNotFit:
        assert refusal(may_leave) is not None
        return
    if room.wait_s:
        assert not room.victims
        assert refusal(settled) is not None
        later = {one.name for one in residents if NOW + room.wait_s - one.loaded_at >= MIN_RESIDENT_S - 1e-6}
        assert refusal(later & may_leave) is None
        return
    victims = set(room.victims)
    assert victims <= settled
    assert refusal(victims) is None
    assert all(refusal(victims - {name}) is not None for name in victims)
    assert not victims or refusal(frozenset()) is not None
    ordered = sorted(residents, key=lambda one: (one.priority, one.used_at, one.name))
    last = max((i for i, one in enumerate(ordered) if one.name in victims), default=-1)
    earlier = {one.name for one in ordered[: max(last, 0)]} & settled
    assert not victims or refusal(earlier) is not None
