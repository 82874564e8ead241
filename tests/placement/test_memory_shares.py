"""Every model gets its weights and a context, the rest is shared evenly, and no Mac's memory is given away twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.memory_shares import MemoryNeed, MemoryNeeds, least_shares, share_memory
from effort import effort

MACS = ("x", "y", "z")
NEEDS = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(st.sampled_from(MACS), st.builds(MemoryNeed, st.integers(0, 500), st.integers(0, 90)), min_size=1),
    min_size=1,
)


def least_on(mac: str, needs: MemoryNeeds) -> int:
    return sum(stages[mac].least for stages in needs.values() if mac in stages)


def contexts(name: str, needs: MemoryNeeds, shares: dict[str, dict[str, int]]) -> float:
    """Return how many full contexts the model has room for."""
    stages = [(need, shares[name][mac]) for mac, need in needs[name].items() if need.context_bytes]
    return min(((share - need.weight_bytes) / need.context_bytes for need, share in stages), default=0.0)


@settings(max_examples=effort(150, 1000, 40), deadline=None)
@given(
    NEEDS,
    st.dictionaries(st.sampled_from(MACS), st.integers(0, 2000)),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9)),
)
def test_no_byte_is_given_twice_and_nobody_could_have_more_without_taking_it_from_one_with_less(
    needs: MemoryNeeds, free: dict[str, int], limits: dict[str, int]
) -> None:
    usable = {mac: least_on(mac, needs) + free.get(mac, 0) for mac in MACS}
    shares = share_memory(usable, needs, limits)
    for mac in MACS:
        given_away = sum(stages.get(mac, 0) for stages in shares.values())
        assert given_away <= usable[mac]
        unlimited = [name for name, stages in needs.items() if mac in stages and name not in limits]
        assert not unlimited or given_away == usable[mac]
    for name, stages in needs.items():
        assert all(shares[name][mac] >= need.least for mac, need in stages.items())
        if name in limits:
            most = [need.weight_bytes + limits[name] * need.context_bytes for need in stages.values()]
            assert all(shares[name][mac] <= bytes_ for mac, bytes_ in zip(stages, most, strict=True))
        has_caches = any(need.context_bytes for need in stages.values())
        if has_caches and contexts(name, needs, shares) < limits.get(name, 10**6) - 1e-6:
            rest = {mac: usable[mac] - sum(s.get(mac, 0) for s in shares.values()) for mac in stages}
            assert min(rest.values()) < len(needs), "it stops only at a full Mac"


def test_one_model_alone_gets_everything() -> None:
    needs = {"a": {"x": MemoryNeed(100, 10), "y": MemoryNeed(50, 5)}}
    assert share_memory({"x": 300, "y": 90}, needs) == {"a": {"x": 300, "y": 90}}
    assert share_memory({"x": 300, "y": 90}, needs, {"a": 3}) == {"a": {"x": 130, "y": 65}}


def test_models_on_one_mac_have_room_for_equally_many_contexts() -> None:
    needs = {"a": {"x": MemoryNeed(100, 30)}, "b": {"x": MemoryNeed(100, 10)}}
    assert share_memory({"x": 400}, needs) == {"a": {"x": 250}, "b": {"x": 150}}


def test_what_one_cannot_use_for_its_limit_goes_to_the_other() -> None:
    needs = {"a": {"x": MemoryNeed(100, 10)}, "b": {"x": MemoryNeed(100, 10)}}
    assert share_memory({"x": 400}, needs, {"a": 2}) == {"a": {"x": 120}, "b": {"x": 280}}


def test_a_model_that_is_bound_on_one_mac_leaves_another_to_the_other_models_there() -> None:
    """The first can keep two contexts on its small Mac, so more of the large one would serve nothing."""
    needs = {"wide": {"small": MemoryNeed(80, 10), "large": MemoryNeed(80, 10)}, "b": {"large": MemoryNeed(10, 10)}}
    shares = share_memory({"small": 100, "large": 400}, needs)
    assert shares == {"wide": {"small": 100, "large": 100}, "b": {"large": 300}}


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="on x need 5 bytes more"):
        share_memory({"x": 100}, {"a": {"x": MemoryNeed(100, 5)}})


def test_of_two_ways_to_share_the_lesser_leaves_room_for_both() -> None:
    one = {"a": {"x": 70, "y": 30}, "b": {"x": 30}}
    other = {"a": {"x": 50, "y": 40}, "c": {"x": 50}}
    assert least_shares(one, other) == {"a": {"x": 50, "y": 30}, "b": {"x": 30}, "c": {"x": 50}}
