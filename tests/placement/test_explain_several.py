"""The sentences about several models: who is where, who gave way, and who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.core.limits import GIB
from cluster.core.plan import Objective
from cluster.placement.arrangement import LoadedModel, ModelDemand
from cluster.placement.candidates import Candidates
from cluster.placement.explain_several import explain_place, explain_placement
from cluster.placement.propose import PlanRequest
from cluster.placement.several_models import place_models
from placement.test_propose import SLOW, mac
from placement.test_several_models import crowd

MACS = Candidates([mac("fast", 60), mac("slow", 40, SLOW)])


def told(*demands: ModelDemand, loaded: tuple[LoadedModel, ...] = ()) -> tuple[str, ...]:
    return explain_placement(place_models(demands, loaded))


def test_one_model_alone_needs_no_sentence() -> None:
    assert told(*crowd(MACS, ("large", 30, False))) == ()


def test_it_is_said_which_macs_are_free_and_who_shares_one() -> None:
    large, small, tiny = crowd(MACS, ("large", 40, False), ("small", 30, False), ("tiny", 3, False))
    assert told(large, small) == ("small is on slow, which large leaves free",)
    assert told(large, small, tiny) == (
        "small is on slow, which large leaves free",
        "tiny is on slow and shares it with small (which spends 100% of a token's time there); no Mac is free",
        "models on the same Mac slow each other down while both answer; predictions do not count that",
    )
    loaded = LoadedModel("loaded", {"slow": 30 * GIB}, {"slow": 1.0})
    assert told(replace(large, request=PlanRequest(stage_count=1)), loaded=(loaded,)) == (
        "large is on fast, which loaded leaves free",
    )
    wide = replace(crowd(MACS, ("wide", 60, False))[0], request=PlanRequest(stage_count=2))
    (shared, _) = told(wide, loaded=(loaded,))
    assert shared.startswith(
        "wide is on slow and fast and shares slow with loaded (which spends 100% of a token's time"
    )
    assert shared.endswith("there); fast alone is too small for it")


def test_a_model_that_gives_way_to_pinned_ones_is_told_what_it_loses() -> None:
    large, other = crowd(MACS, ("large", 30, False), ("other", 40, True))
    other = replace(other, request=PlanRequest(stage_count=1))
    assert told(large, other)[0] == (
        "large makes room for other, so that all pinned models fit: 5.68 tokens/s instead of 23.9 tokens/s"
    )
    many = replace(large, request=PlanRequest(Objective.THROUGHPUT))
    assert told(many, other)[0].endswith(": a slowest stage of 153 ms instead of a slowest stage of 37.2 ms")


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (
            (("large", 50, False), ("other", 80, False)),
            "other fits only when large is unloaded; then it would be on slow and fast",
        ),
        (
            (("large", 50, True), ("other", 80, False)),
            "other does not fit beside the models that are pinned or come first; pin fewer, or add a Mac",
        ),
        (
            (("large", 50, False), ("huge", 200, False)),
            "m does not fit: it needs 203 GiB with 1 x 4096 tokens of context, the workers offer 95 GiB;",
        ),
    ],
)
def test_what_does_not_fit_is_told_why(models: tuple[tuple[str, int, bool], ...], expected: str) -> None:
    sentence = told(*crowd(MACS, *models))[-1].replace("huge does", "m does")
    assert sentence.startswith(expected)


def test_more_workers_than_there_are_are_refused() -> None:
    large, other = crowd(MACS, ("large", 30, False), ("other", 30, False))
    sentence = told(large, replace(other, request=PlanRequest(stage_count=3)))[-1]
    assert sentence == "other was to be placed on 3 workers, and there are 2"


def test_each_model_is_explained_over_the_macs_that_are_left_to_it() -> None:
    """Alone, the small one would be on the fast Mac; its reasons do not propose that."""
    placement = place_models(crowd(MACS, ("large", 40, False), ("small", 20, False)))
    large, small = (explain_place(placement, place) for place in placement.placed)
    assert [w.name for w in small.workers] == ["slow"]
    assert not any("fast" in reason for reason in small.reasons)
    assert large.forecast
    assert small.forecast
    assert large.reasons[0].startswith("bound by memory bandwidth")
