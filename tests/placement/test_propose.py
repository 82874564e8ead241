"""A plan's forecasts, spares and reasons, and the planner's refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cluster.core.errors import DoesNotFit, InvalidOption, NoPlan
from cluster.core.limits import GIB
from cluster.core.plan import LayerRange, Link, ModelRef, ModelShape, Objective, Profile, SharedWeight
from cluster.core.text import figure_in_words
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.chips import CHIPS, assumed_workers
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.predicted_step_time import (
    EXPERT_COST,
    ROUTER_LAUNCHES,
    decode_s,
    read_bytes,
    read_experts,
    verify_s,
)
from cluster.placement.propose import PlanRequest, propose

FAST, SLOW = Profile(8e11, 1e-5, 1e-4, 2e13, 0.2), Profile(1e11, 1e-5, 1e-4, 4e12, 0.2)


def shape(layers: int = 40, gib: int = 1, **more: object) -> ModelShape:
    made = ModelShape(
        model=ModelRef("m", "", "f"),
        layers=layers,
        layer_bytes=(gib * GIB,) * layers,
        cache_bytes=(GIB // 64,) * layers,
        shared=(),
        clean_cuts=tuple(range(1, layers)),
        unclean=(),
        max_context=4096,
        flops=(2e9,) * layers,
        boundary_bytes=(16384,) * layers,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def mac(name: str, gib: int, profile: Profile = FAST) -> Candidate:
    return Candidate(WorkerMemory(name, gib * GIB), profile)


def told(candidates: Candidates, request: PlanRequest | None = None, model: ModelShape | None = None) -> str:
    made = propose(model or shape(), candidates, request or PlanRequest())
    return "\n".join((*made.reasons, *(f"{s.worker}: {s.why}" for s in made.spares)))


def test_one_mac_that_holds_it_all_is_enough() -> None:
    candidates = Candidates([mac("slow", 100, SLOW), mac("fast", 100), mac("twin", 100)])
    made = propose(shape(), candidates, PlanRequest())
    assert [w.name for w in made.workers] == ["fast"]
    assert {s.worker for s in made.spares} == {"slow", "twin"}
    said = told(candidates)
    assert "slow: fast is enough; with it a token would take" in said
    assert "twin: fast is enough, and it would make no token noticeably faster" in said
    assert "bound by memory bandwidth" in said
    assert made.forecast
    assert made.forecast.one_user == pytest.approx(1 / (made.decode_s[0] + candidates.ends_s()))


def test_throughput_takes_both_and_says_who_would_be_faster_alone() -> None:
    candidates = Candidates([mac("fast", 100), mac("slow", 100, replace(SLOW, bandwidth=4e11))])
    made = propose(shape(), candidates, PlanRequest(Objective.THROUGHPUT))
    assert len(made.workers) == 2
    said = told(candidates, PlanRequest(Objective.THROUGHPUT))
    assert "fast alone would be faster for one user" in said
    assert "and for eight" not in said
    little = Candidates([mac("fast", 100), mac("slow", 100, SLOW)])
    assert "; and for eight: 58.5 against 49.5" in told(little, PlanRequest(Objective.THROUGHPUT))
    latency = propose(shape(), candidates, PlanRequest())
    assert made.forecast
    assert latency.forecast
    assert made.forecast.eight_users > latency.forecast.eight_users
    assert made.forecast.one_user < latency.forecast.one_user


def test_guesses_make_more_macs_worth_while_and_their_gain_is_named() -> None:
    candidates = Candidates([mac("a", 100), mac("b", 100)])
    request = PlanRequest(acceptance=0.7)
    assert len(propose(shape(), candidates, PlanRequest()).workers) == 1
    assert len(propose(shape(), candidates, request).workers) == 2
    assert "with 70% of guesses right, one user gets 27.4 tokens/s instead of 17.8" in told(candidates, request)
    assert "alone would be faster" not in told(candidates, request)
    made = propose(shape(), candidates, request).forecast
    assert made
    assert made.one_user == pytest.approx(27.4, abs=0.05)
    halves = PlanRequest(layers=(LayerRange(0, 30), LayerRange(30, 40)), acceptance=0.7)
    assert "the planner would choose a 0-19, b 20-39: 27.4 tokens/s instead of" in told(candidates, halves)
    throughput = PlanRequest(Objective.THROUGHPUT, acceptance=0.7)
    assert told(candidates, throughput) == told(candidates, PlanRequest(Objective.THROUGHPUT))


def test_what_binds_is_named() -> None:
    tight = Candidates([mac("a", 24), mac("b", 24, SLOW)])
    assert "also bound by memory: with 17.8 GiB more on a, a 0-39 would give 18 tokens/s" in told(tight)
    far = Candidates([mac("a", 24), mac("b", 24)], link=Link(1.0, 1e6))
    assert "bound by links" in told(far)
    slow_start = Profile(1e15, 0.01, 0.0, 1e13)
    assert "bound by the start of layers" in told(Candidates([mac("a", 100, slow_start)]))


def test_given_layers_are_checked_by_the_same_rules_and_compared() -> None:
    candidates = Candidates([mac("fast", 100), mac("slow", 100, SLOW)])
    request = PlanRequest(layers=(LayerRange(0, 5), LayerRange(5, 40)))
    assert [r.end for r in propose(shape(), candidates, request).ranges] == [5, 40]
    assert "fast alone would be faster" in told(candidates, request)
    with pytest.raises(DoesNotFit, match=r"slow lacks 16.5 GiB"):
        propose(shape(), Candidates([mac("fast", 100), mac("slow", 20, SLOW)]), request)
    tied = shape(clean_cuts=tuple(c for c in range(1, 40) if c != 5), unclean=((5, "tied"),))
    with pytest.raises(NoPlan, match="cannot be cut before layer 5"):
        propose(tied, candidates, request)
    with pytest.raises(NoPlan, match="2 layer ranges were given, but there is 1 worker; give fewer"):
        propose(shape(), Candidates([mac("fast", 100)]), request)
    with pytest.raises(NoPlan, match="2 layer ranges were given, but --workers 1; give as many ranges as workers"):
        propose(shape(), candidates, replace(request, stage_count=1))
    with pytest.raises(NoPlan, match="m has layers 0-39, but the ranges end at layer 40"):
        propose(shape(), candidates, replace(request, layers=(LayerRange(0, 41),), stage_count=2))


def test_of_more_workers_than_ranges_the_best_hold_them_in_the_best_order() -> None:
    candidates = Candidates([mac("slow", 100, SLOW), mac("small", 8), mac("fast", 40), mac("tiny", 4)])
    layers = (LayerRange(0, 5), LayerRange(5, 40))
    for stages in (None, 2):
        made = propose(shape(), candidates, PlanRequest(layers=layers, stage_count=stages))
        assert [w.name for w in made.workers] == ["small", "fast"]
        assert made.ranges == layers
        assert {(s.worker, s.why) for s in made.spares} == {(n, "2 layer ranges were given") for n in ("slow", "tiny")}
    unmeasured = Candidates([mac(w.name, w.memory.nbytes // GIB, Profile()) for w in candidates.workers])
    made = propose(shape(), unmeasured, PlanRequest(layers=(LayerRange(0, 25), LayerRange(25, 40))))
    assert [w.name for w in made.workers] == ["slow", "fast"], "the largest, in their order"
    with pytest.raises(DoesNotFit, match=r"offer 133 GiB; fast lacks 103 GiB"):
        propose(shape(gib=4), candidates, PlanRequest(layers=layers))


def test_what_fits_nowhere_is_refused_with_the_gib_missing() -> None:
    with pytest.raises(DoesNotFit, match=r"needs 40.6 GiB .* the workers offer 19 GiB; a lacks .* GiB; b lacks"):
        propose(shape(), Candidates([mac("a", 10), mac("b", 10)]), PlanRequest())
    with pytest.raises(NoPlan, match="not 3; use --workers 2 or fewer"):
        propose(shape(clean_cuts=(20,)), Candidates([mac(n, 100) for n in "abc"]), PlanRequest(stage_count=3))


def test_an_unknown_speed_means_all_of_them_by_memory() -> None:
    candidates = Candidates([mac("a", 30), mac("b", 60, Profile())])
    made = propose(shape(), candidates, PlanRequest())
    assert [(w.name, len(r)) for w, r in zip(made.workers, made.ranges, strict=True)] == [("a", 13), ("b", 27)]
    assert made.forecast is None
    assert made.reasons == ("split by memory, with all workers equally full: the speed of b has not been measured",)


def test_of_workers_of_unknown_speed_the_too_small_are_spare() -> None:
    candidates = Candidates([mac("tiny", 0, Profile()), mac("a", 30), mac("b", 60, Profile())])
    made = propose(shape(), candidates, PlanRequest())
    assert [(w.name, len(r)) for w, r in zip(made.workers, made.ranges, strict=True)] == [("a", 13), ("b", 27)]
    assert [(s.worker, s.why) for s in made.spares] == [("tiny", "the others hold the model, and are faster or larger")]
    with pytest.raises(DoesNotFit, match=r"the workers offer 9.5 GiB; tiny lacks .* GiB; a lacks"):
        propose(shape(), Candidates([mac("tiny", 0, Profile()), mac("a", 10)]), PlanRequest())


def test_a_number_of_workers_is_as_asked() -> None:
    candidates = Candidates([mac("a", 100, SLOW), mac("b", 100), mac("c", 100)])
    made = propose(shape(), candidates, PlanRequest(stage_count=2))
    assert [w.name for w in made.workers] == ["b", "c"]
    assert made.spares[0].why == "2 workers were asked for"


def test_the_slowest_link_of_a_plan_is_told() -> None:
    macs = [mac("a", 20), mac("b", 20), mac("c", 20)]
    assert "link" not in told(Candidates(macs)), "none was measured"
    slow = Link(5e-3, 4e7)
    links = {(s, t): slow if {s, t} == {"a", "b"} else Link(3e-4, 5e9) for s in "abc" for t in "abc" if s != t}
    said = told(Candidates(macs, links))
    assert re.search(r"the slowest of 2 links is (a to c|b to c): 5 GB/s, round trip 0.3 ms", said), (
        "c is in the middle"
    )
    two = Candidates(macs[:2], dict.fromkeys((("a", "b"), ("b", "a")), slow))
    (said,) = [line for line in told(two, model=shape(30)).splitlines() if line.startswith("the link is ")]
    assert said.endswith(": 0.04 GB/s, round trip 5.0 ms")
    cable = Candidates(macs[:2], dict.fromkeys((("a", "b"), ("b", "a")), replace(slow, interface="Ethernet (en0)")))
    assert " over Ethernet (en0): 0.04 GB/s, round trip 5.0 ms" in told(cable, model=shape(30))


def test_what_another_mac_brings_is_told() -> None:
    """Room, users and prompts; one user's speed grows with guesses alone."""
    two = Candidates([mac("a", 30), mac("b", 30)], {("a", "b"): Link(1e-3, 1e9), ("b", "a"): Link(1e-3, 1e9)})
    (said,) = [line for line in told(two).splitlines() if "would bring" in line]
    assert said.startswith("another Mac like a would bring 45.5 GiB instead of 17 GiB for caches, ")
    assert "for eight users, the first token of a prompt of 2048 tokens in " in said
    assert "; one user would get " in said
    assert said.endswith(" with 70% of guesses right")
    request = PlanRequest(acceptance=0.7)
    forecast = propose(shape(), two, request).forecast
    assert forecast
    (guessed,) = [line for line in told(two, request).splitlines() if "would bring" in line]
    assert guessed.endswith(f" tokens/s instead of {figure_in_words(forecast.one_user)}")
    for lanes, gains in ((8, True), (1, False)):
        forecast = propose(shape(), two, PlanRequest(lanes=lanes)).forecast
        assert forecast
        (laned,) = [line for line in told(two, PlanRequest(lanes=lanes)).splitlines() if "would bring" in line]
        assert (f" instead of {figure_in_words(forecast.eight_users)} for eight users" in laned) is gains
    spare = told(Candidates([mac("a", 100), mac("b", 100)]))
    assert "one more of these Macs would bring" in spare
    many = Candidates([mac(f"m{i}", 30 + i, replace(FAST, bandwidth=8e11 + i)) for i in range(9)])
    assert "would bring" not in told(many), "too many orders to try"


def test_lessons_are_told() -> None:
    taught = replace(FAST, corrections=(("f", 1.4),))
    assert "a's frames were 1.40 times slower than its profile predicts" in told(Candidates([mac("a", 100, taught)]))
    assert "--profile new" not in told(Candidates([mac("a", 100, taught)]))
    wrong = replace(FAST, corrections=(("f", 0.2),))
    said = told(Candidates([mac("a", 100, wrong)]))
    assert "a's frames were 5.00 times faster than its profile predicts; it was busy when it was measured: `mac" in said
    busy = replace(FAST, corrections=(("f", 3.0),))
    assert "predicts; it is busy, or its profile is wrong: `macpipe" in told(Candidates([mac("a", 100, busy)]))


def test_a_token_reads_its_experts_and_a_row_of_the_embedding() -> None:
    embed = SharedWeight("embed", 1000, (0, 1), lookup_bytes=10, head=True)
    model = shape(2, layer_bytes=(100, 100), active_bytes=(30, 100), expert_bytes=(80, 0), shared=(embed,))
    assert read_bytes(model, LayerRange(0, 1)) == 40
    assert read_bytes(model, LayerRange(1, 2)) == 1100
    assert read_bytes(model, LayerRange(0, 2)) == 1130
    assert read_bytes(model, LayerRange(0, 1), rows=2) == pytest.approx(20 + 80 * (1 - (1 - 10 / 80) ** 2) + 20)
    free = Profile(1.0, row_cost=1.0)
    caches = 2 * model.stage_cache_bytes(LayerRange(0, 1))
    grown = read_bytes(model, LayerRange(0, 1), rows=2) + 30
    grown += (EXPERT_COST - 1) * read_experts(model, LayerRange(0, 1), rows=2)
    assert decode_s(model, free, LayerRange(0, 1), rows=2) == pytest.approx(grown + caches)


def mixture(layers: int, hidden: int, width: int, experts: int, chosen: int, attention: float) -> ModelShape:
    """Return the shape of a mixture with 4-bit weights: ``attention`` weights a layer, experts of three matrices."""
    expert = 3 * hidden * width * 4.5 / 8
    dense, every = int(attention * 4.5 / 8), int(experts * expert)
    head = SharedWeight("head", 151_936 * hidden * 9 // 16, (layers - 1,))
    return shape(
        layers,
        layer_bytes=(dense + every,) * layers,
        active_bytes=(dense + int(chosen * expert),) * layers,
        expert_bytes=(every,) * layers,
        cache_bytes=(4096 * 2048,) * layers,
        shared=(head,),
    )


@pytest.mark.parametrize(
    ("model", "chip", "least", "most"),
    [
        (mixture(94, 4096, 1536, 128, 8, 71e6), "m3-ultra-512", 25, 30),  # Qwen3-235B-A22B
        (mixture(40, 2048, 512, 257, 9, 24e6), "m5-max-128", 120, 146),  # Qwen3.5-35B-A3B: 133 of mlx-swift-lm, 2026-04
    ],
)
def test_mixtures_are_as_fast_as_public_figures_say(model: ModelShape, chip: str, least: float, most: float) -> None:
    made = propose(model, assumed_workers(chip), PlanRequest()).forecast
    assert made
    assert least <= made.one_user <= most


def test_a_step_of_several_tokens_takes_what_was_measured_and_reads_the_caches_once() -> None:
    measured = replace(FAST, verify_costs=((3, 1.1), (8, 2.2)))
    stage = LayerRange(0, 20)
    one, three = verify_s(shape(), measured, stage, 1), verify_s(shape(), measured, stage, 3)
    assert one == decode_s(shape(), measured, stage)
    assert one
    assert three == pytest.approx(one + 0.1 * 20 * GIB / FAST.bandwidth)
    assert verify_s(shape(), measured, stage, 2) is None
    assert verify_s(shape(), FAST, stage, 3) is None
    assert verify_s(shape(), Profile(), stage, 1) is None
    experts = shape(active_bytes=(GIB // 2,) * 40, expert_bytes=(GIB * 3 // 4,) * 40)
    both = verify_s(experts, measured, stage, 3)
    assert both
    gathered = (EXPERT_COST - 1) * read_experts(experts, stage, 3)
    read = read_bytes(experts, stage, 3) + gathered + 0.1 * 20 * GIB / 4
    assert both == pytest.approx(
        (1 + ROUTER_LAUNCHES) * 20e-5 + 1e-4 + (read + experts.stage_cache_bytes(stage, 2048)) / FAST.bandwidth
    )


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("row_cost", [0.0, 1.0, 2.7])
def test_many_users_are_never_predicted_to_be_slower_than_one(lanes: int, row_cost: float) -> None:
    noisy = replace(FAST, row_cost=row_cost)
    made = propose(shape(), Candidates([mac("a", 30, noisy), mac("b", 30, noisy)]), PlanRequest(lanes=lanes)).forecast
    assert made
    assert made.eight_users >= made.one_user
    stage = LayerRange(0, 20)
    assert decode_s(shape(), noisy, stage, rows=8) <= 8 * decode_s(shape(), noisy, stage)


def test_a_prompt_is_as_long_as_the_context_allows() -> None:
    roomy, tight = (
        propose(shape(max_context=n), Candidates([mac("a", 60)]), PlanRequest()).forecast for n in (4096, 300)
    )
    assert roomy
    assert tight
    assert (roomy.prompt_tokens, tight.prompt_tokens) == (2048, 300)
    assert tight.first_token_s < roomy.first_token_s


def test_an_assumed_mac_has_no_limit_to_be_raised() -> None:
    with pytest.raises(DoesNotFit, match=r"; add a worker$"):
        propose(shape(), assumed_workers("m4-24"), PlanRequest())
    with pytest.raises(DoesNotFit, match=r"; add a worker, or raise --memory-limit$"):
        propose(shape(), Candidates([mac("a", 16)]), PlanRequest())


@pytest.mark.parametrize("written", ["2x m2-ultra-192", "2xm2-ultra-192", "m2-ultra-192x2"])
def test_a_number_of_macs_goes_before_or_behind(written: str) -> None:
    assert [w.name for w in assumed_workers(written).workers] == ["m2-ultra-192#1", "m2-ultra-192#2"]


def test_macs_are_assumed_by_name() -> None:
    made = assumed_workers("m2-ultra-192, m4-pro-48x2,10GbE")
    assert [w.name for w in made.workers] == ["m2-ultra-192", "m4-pro-48#1", "m4-pro-48#2"]
    assert made.workers[0].memory.nbytes == 144 * GIB
    assert made.workers[1].profile == made.workers[2].profile
    assert made.link.bandwidth == 1.15e9
    assert assumed_workers("m2-ultra-192 + 2x m4-pro-48 + 10gbe") == made
    small, large = (assumed_workers(w).workers[0].profile.bandwidth for w in ("m3-max-36", "m3-max-64"))
    assert small < large
    assert all(assumed_workers(f"{chip}-32").workers for chip in CHIPS)
    laptops = [
        assumed_workers(w).workers[0].profile.bandwidth for w in ("m5-32", "m5-pro-64", "m5-max-36", "m5-max-128")
    ]
    assert [round(b / 0.8e9) for b in laptops] == [153, 307, 460, 614], "Apple's figures of the M5 family"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", "names no Mac"),
        ("10gbe", "names no Mac"),
        ("m9-48", "m4-pro"),
        ("m4-pro", "m4-pro-48x2,10gbe"),
        ("m4-48x0", "from 1 to 64 Macs of one kind here, and 0 were given"),
        ("m4-48x65", "from 1 to 64 Macs"),
        ("2xm4-48x2", "does not know"),
        ("0x m4-48", "from 1 to 64 Macs"),
        ("m4-pro-0", "from 8 to 1024 GB here, and 0 was given"),
        ("m4-pro-4800", "from 8 to 1024 GB"),
        ("m4-48,wifi,10gbe", "more than one link"),
    ],
)
def test_what_cannot_be_assumed_is_said(written: str, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        assumed_workers(written)
