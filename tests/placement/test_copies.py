"""As few copies go as suffice for another model, and those that should go first."""

from __future__ import annotations

from cluster.core.limits import GIB
from cluster.placement.arrangement import LoadedModel, ModelDemand
from cluster.placement.candidates import Candidates
from cluster.placement.copies import choose_copies_to_drop
from placement.test_propose import SLOW, mac
from placement.test_several_models import crowd

MACS = Candidates([mac("a", 60), mac("b", 60), mac("c", 30), mac("d", 30, SLOW)])


def demand(name: str, layers: int, macs: Candidates = MACS) -> ModelDemand:
    """Return a model of so many layers of 1 GiB."""
    (made,) = crowd(macs, (name, layers, False))
    return made


def copy(name: str, *macs: str, gib: int = 25) -> LoadedModel:
    return LoadedModel(name, dict.fromkeys(macs, gib * GIB), dict.fromkeys(macs, 1 / len(macs)))


def test_no_copy_goes_for_a_model_that_fits_on_an_idle_mac() -> None:
    loaded = [copy("served", "a", gib=50), copy("served#2", "b", gib=50)]
    assert choose_copies_to_drop(demand("next", 20), loaded, ["served#2"]) == ()


def test_the_fewest_copies_go_and_the_first_of_those_that_suffice() -> None:
    loaded = [copy("served", "a", gib=50), copy("served#2", "b", gib=50), copy("#3", "c"), copy("#4", "d")]
    copies = ["#4", "#3", "served#2"]
    assert choose_copies_to_drop(demand("next", 20), loaded, copies) == ("#4",)
    assert choose_copies_to_drop(demand("next", 20), loaded, copies[1:]) == ("#3",)
    assert choose_copies_to_drop(demand("large", 50), loaded, copies) == ("served#2",)
    assert choose_copies_to_drop(demand("wide", 85), loaded, copies) == ("#4", "served#2")
    assert choose_copies_to_drop(demand("huge", 200), loaded, copies) is None


def test_a_copy_goes_before_a_model_shares_the_mac_of_another_one() -> None:
    macs = Candidates(MACS.workers[:2])
    loaded = [copy("served", "a", gib=20), copy("served#2", "b", gib=50)]
    assert choose_copies_to_drop(demand("next", 20, macs), loaded, ["served#2"]) == ("served#2",)
    assert choose_copies_to_drop(demand("next", 20, macs), loaded, []) == ()


def test_of_many_copies_only_some_sets_are_tried() -> None:
    macs = Candidates([mac(f"m{i}", 30) for i in range(12)])
    copies = [f"#{i}" for i in range(1, 12)]
    loaded = [copy("served", "m0"), *(copy(f"#{i}", f"m{i}") for i in range(1, 12))]
    assert choose_copies_to_drop(demand("wide", 100, macs), loaded, copies) == tuple(copies[:3])
