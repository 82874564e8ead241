"""Replanning: which worker takes over, and which one is to blame. Pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.loss_diagnosis import diagnose, find_hanging, is_excused, unservable, verdicts
from cluster.coordinator.planner import make_plan
from cluster.coordinator.replan import Assignment, holds, reassign_layers, restore_plan
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import DoesNotFit, NoWorkers, WorkerLost
from cluster.core.limits import MIB
from cluster.core.plan import LayerRange, ModelRef, ModelShape, Plan, Profile, RankSizes
from cluster.core.worker import WorkerInfo

MODEL = ModelRef("m", "", "f" * 64)
SHAPE = ModelShape(MODEL, 6, (10 * MIB,) * 6, (MIB,) * 6, (), (1, 2, 3, 4, 5), (), 64)
ORDER = LoadOrder("m", worker_count=3)
EPOCH = 7
CAUSE = WorkerLost("cyd: the data stream broke", worker="cyd")


def worker(name: str, megabytes: int = 40, **more: object) -> WorkerInfo:
    info = WorkerInfo(f"id-{name}", name, "", f"{name}:1", f"{name}:2", "", "", "", 0, megabytes * MIB)
    return replace(info, **more)  # type: ignore[arg-type]


def holding(name: str, start: int, end: int, **more: object) -> WorkerInfo:
    held = {"epoch": EPOCH, "layers": LayerRange(start, end), "fingerprint": MODEL.fingerprint, **more}
    return worker(name, **held)  # type: ignore[arg-type]


STAGES = (holding("ada", 0, 2), holding("bob", 2, 4), holding("cyd", 4, 6))
PLAN = make_plan(EPOCH, SHAPE, STAGES, ORDER)


def members(*workers: WorkerInfo, **problems: str) -> list[RosterEntry]:
    return [RosterEntry(f, problems.get(f.name, ""), f.name not in problems) for f in workers]


def chosen(
    *workers: WorkerInfo, without: tuple[str, ...] = (), last: tuple[str, ...] = (), **problems: str
) -> list[tuple[str, str]]:
    found = reassign_layers(EPOCH + 1, PLAN, SHAPE, ORDER, members(*workers, **problems), without, last)
    assert [w.name for w in found.workers] == [s.worker for s in found.plan.stages]
    assert found.plan.epoch == EPOCH + 1
    return [(s.worker, str(s.layers)) for s in found.plan.stages]


def test_the_same_workers_come_first_then_a_spare_then_a_new_cut() -> None:
    dee = worker("dee")
    assert chosen(*STAGES, dee) == [("ada", "0-1"), ("bob", "2-3"), ("cyd", "4-5")]
    assert chosen(*STAGES, dee, bob="gone") == [("ada", "0-1"), ("dee", "2-3"), ("cyd", "4-5")]
    assert chosen(*STAGES, bob="gone") == [("ada", "0-2"), ("cyd", "3-5")]
    assert chosen(*STAGES, without=("ada",)) == [("bob", "0-2"), ("cyd", "3-5")]


def test_the_draft_models_worker_takes_layers_only_where_no_other_spare_can() -> None:
    dee, eve, tiny = worker("dee", 80), worker("eve"), worker("fay", 1)
    kept = [("ada", "0-1"), ("eve", "2-3"), ("cyd", "4-5")]
    assert chosen(*STAGES, dee, last=("dee",)) == [("ada", "0-1"), ("bob", "2-3"), ("cyd", "4-5")]
    assert chosen(*STAGES, dee, eve, last=("dee",), bob="gone") == kept
    taken = [("ada", "0-1"), ("dee", "2-3"), ("cyd", "4-5")]
    assert chosen(*STAGES, dee, last=("dee",), bob="gone") == taken
    assert chosen(*STAGES, dee, tiny, last=("dee",), bob="gone") == taken
    both = chosen(*STAGES, dee, last=("dee",), ada="gone", bob="gone")
    assert [name for name, _ in both] == ["cyd", "dee"], "the layers do not fit on cyd alone"
    roomy = (holding("ada", 0, 2), holding("bob", 2, 4), holding("cyd", 4, 6, memory_limit=400 * MIB))
    alone = chosen(*roomy, dee, last=("dee",), ada="gone", bob="gone")
    assert alone == [("cyd", "0-5")], "the draft stays where the layers fit without its worker"
    assert chosen(*STAGES, worker("dee", 400), last=("dee",), ada="gone", bob="gone", cyd="gone") == [("dee", "0-5")]


def test_the_spare_that_has_the_layers_already_is_taken_before_a_larger_one() -> None:
    had = holding("dee", 2, 4, epoch=EPOCH - 3)
    assert chosen(*STAGES, worker("eve", 80), had, bob="gone")[1] == ("dee", "2-3")
    assert chosen(*STAGES, worker("eve", 80), worker("dee"), bob="gone")[1] == ("eve", "2-3")


def test_a_spare_that_is_too_small_leads_to_a_new_cut() -> None:
    assert (
        chosen(*STAGES, worker("dee", 12), bob="gone") == [("ada", "0-2"), ("cyd", "3-5")]
        or len(chosen(*STAGES, worker("dee", 12), bob="gone")) == 3
    )


def test_who_is_drained_is_given_nothing() -> None:
    drained = (*STAGES[:2], replace(STAGES[2], draining=True))
    assert [name for name, _ in chosen(*drained, worker("dee"))] == ["ada", "bob", "dee"]


def test_a_worker_that_is_too_small_for_any_piece_does_not_stand_in_the_way() -> None:
    """Anybody who is let in could stop every recovery with a Mac that offers a thousand bytes."""
    tiny = worker("tiny", 0, memory_limit=1000)
    assert chosen(*STAGES, tiny, bob="gone") == [("ada", "0-2"), ("cyd", "3-5")]


def test_a_new_cut_pairs_each_stage_with_its_worker_where_the_planner_puts_them_in_another_order() -> None:
    """With measured speeds, the last stage of a throughput plan may be the first worker's."""
    quick, slow = Profile(8e11, 1e-5, 1e-4, 2e13, 0.2), Profile(1e11, 1e-5, 1e-4, 4e12, 0.2)
    workers = [
        replace(w, profile=p, memory_limit=m * MIB) for w, p, m in ((STAGES[0], slow, 12), (STAGES[1], quick, 80))
    ]
    heavy_end = replace(SHAPE, layer_bytes=(40 * MIB, *(MIB,) * 5), clean_cuts=(1, 5))
    plan = make_plan(EPOCH, SHAPE, STAGES, ORDER)
    found = reassign_layers(EPOCH + 1, plan, heavy_end, ORDER, members(*workers))
    assert [s.worker for s in found.plan.stages] == ["bob", "ada"]
    assert [w.name for w in found.workers] == ["bob", "ada"]


def test_what_fits_nowhere_says_whose_loss_it_was_and_what_is_missing() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        chosen(STAGES[0])
    error = unservable(CAUSE, refusal.value)
    assert error.grpc_status == "UNAVAILABLE"
    assert error.details["worker"] == "cyd"
    assert int(error.details["missing_bytes"]) > 20 * MIB
    assert "cyd: the data stream broke" in error.sentence
    assert "ada lacks" in error.sentence
    with pytest.raises(NoWorkers):
        chosen(*STAGES, ada="gone", bob="gone", cyd="gone")


def test_the_guilty_are_named_and_not_their_neighbours() -> None:
    assert diagnose(CAUSE, PLAN, members(*STAGES), STAGES) is CAUSE
    silent = RosterEntry(STAGES[0], "worker ada at x does not answer", reachable=False)
    found = diagnose(CAUSE, PLAN, (silent, *members(*STAGES[1:])), STAGES)
    assert found.details == {"worker": "ada"}
    assert found.sentence == "ada stopped answering"
    removed = replace(silent, problem="ada was removed from the cluster c", outside="removed")
    assert verdicts(PLAN, (removed, *members(*STAGES[1:])), STAGES) == {"ada": "ada was removed from the cluster c"}
    crashed = RosterEntry(STAGES[1], "the engine was ended by SIGKILL")
    assert verdicts(PLAN, (*members(STAGES[0], STAGES[2]), crashed), STAGES) == {
        "bob": "worker bob: the engine was ended by SIGKILL"
    }
    restarted = (STAGES[0], replace(STAGES[1], epoch=0), STAGES[2])
    assert verdicts(PLAN, members(*restarted), STAGES)["bob"] == (
        "worker bob lost layers 2-3: its engine was restarted"
    )
    anew = (STAGES[0], replace(STAGES[1], epoch=0, instance="another"), STAGES[2])
    assert verdicts(PLAN, members(*anew), STAGES)["bob"] == "worker bob lost layers 2-3: it was restarted"
    taken = (STAGES[0], replace(STAGES[1], epoch=EPOCH + 5, model="other"), STAGES[2])
    assert "another coordinator loaded other there" in verdicts(PLAN, members(*taken), STAGES)["bob"]
    assert verdicts(PLAN, members(*STAGES[:2]), STAGES) == {"cyd": "worker cyd is missing"}


def test_who_hangs_is_who_has_been_at_one_step_for_longest() -> None:
    busy = members(STAGES[0], replace(STAGES[1], busy_ms=9000), replace(STAGES[2], busy_ms=400))
    assert find_hanging(PLAN, busy, 7500) == "bob"
    assert find_hanging(PLAN, busy, 10_000) is None


def test_an_engine_that_computes_or_whose_machine_is_overloaded_is_excused() -> None:
    slow = members(replace(STAGES[0], computing=True), replace(STAGES[1], lag_seconds=0.5), STAGES[2])
    assert [m.info.name for m in slow if is_excused(m)] == ["ada", "bob"]


def test_the_first_plan_comes_back_once_all_its_workers_are_steady() -> None:
    first = Assignment(PLAN, STAGES)
    now: Plan = reassign_layers(EPOCH + 1, PLAN, SHAPE, ORDER, members(*STAGES, bob="gone")).plan
    assert restore_plan(lambda: EPOCH + 2, first, PLAN, SHAPE, ORDER, STAGES) is None
    assert restore_plan(lambda: EPOCH + 2, first, now, SHAPE, ORDER, STAGES[:2]) is None
    back = restore_plan(lambda: EPOCH + 2, first, now, SHAPE, ORDER, STAGES)
    assert back
    assert [(s.worker, str(s.layers)) for s in back.plan.stages] == [("ada", "0-1"), ("bob", "2-3"), ("cyd", "4-5")]
    assert back.plan.epoch == EPOCH + 2


HALF = RankSizes(2, (5 * MIB,) * 6, (MIB // 2,) * 6, ())
SHARED = replace(SHAPE, rank_sizes=(HALF,))
PAIRS = LoadOrder("m", groups=(("ada", "bob"), ("cyd", "dee")))
FOUR = tuple(worker(name, data_address="127.0.0.1:2") for name in ("ada", "bob", "cyd", "dee"))


def seats(*workers: WorkerInfo, order: LoadOrder = PAIRS, **problems: str) -> list[tuple[str, str, int]]:
    """Who holds what, and as which of how many ranks, after the loss of some of two pairs."""
    plan = make_plan(EPOCH, SHARED, FOUR, order)
    found = reassign_layers(EPOCH + 1, plan, SHARED, order, members(*workers, **problems))
    assert [w.name for w in found.workers] == [s.worker for s in found.plan.stages]
    return [(s.worker, str(s.layers), s.spec.ranks) for s in found.plan.stages]


def test_a_group_is_built_again_over_a_spare_or_dissolved() -> None:
    whole = [("ada", "0-2", 2), ("bob", "0-2", 2), ("cyd", "3-5", 2), ("dee", "3-5", 2)]
    assert seats(*FOUR) == whole
    eve = worker("eve", data_address="127.0.0.1:2")
    assert seats(*FOUR, eve, bob="gone") == [("ada", "0-2", 2), ("eve", "0-2", 2), *whole[2:]]
    left = seats(*FOUR, bob="gone")
    assert {name for name, _, _ in left} == {"ada", "cyd", "dee"}
    assert [ranks for name, _, ranks in left] == [1 if name == "ada" else 2 for name, _, _ in left]
    assert seats(*FOUR, bob="gone", dee="gone") == [("ada", "0-2", 1), ("cyd", "3-5", 1)]


def test_a_rank_never_counts_as_loaded() -> None:
    """MLX's groups are for the life of a process, so that each epoch loads new ones."""
    plan = make_plan(EPOCH, SHARED, FOUR, PAIRS)
    rank = holding("ada", 0, 3, ranks=2)
    assert not holds(rank, plan.stages[0])
    whole = make_plan(EPOCH, SHARED, FOUR[:2], LoadOrder("m", worker_count=2))
    assert not holds(rank, whole.stages[0])
    assert holds(holding("ada", 0, 3), whole.stages[0])


def test_a_group_that_is_built_again_is_predicted_as_it_was_measured() -> None:
    """A recovery measures no links: over an ordinary one, its sums would take far longer."""
    speed = Profile(4e11, 5e-5, 3e-4, 1e13, 0.2)
    fast = tuple(replace(one, profile=speed) for one in FOUR)
    sums = {frozenset(group): AllReduce.measured(20e-6, 1e9) for group in PAIRS.groups}
    plan = make_plan(EPOCH, SHARED, fast, PAIRS, None, sums)
    again = reassign_layers(EPOCH + 1, plan, SHARED, PAIRS, members(*fast)).plan
    assert again.epoch == EPOCH + 1
    assert [s.decode_ms for s in again.stages] == [s.decode_ms for s in plan.stages]
    assert again.forecast == plan.forecast
    eve = replace(worker("eve", data_address="127.0.0.1:2"), profile=speed)
    over_spare = reassign_layers(EPOCH + 1, plan, SHARED, PAIRS, members(*fast, eve, bob="gone"))
    assert over_spare.plan.stages[0].decode_ms > 2 * plan.stages[0].decode_ms, "nobody knows the links to a spare"
    back = restore_plan(lambda: EPOCH + 2, Assignment(plan, fast), over_spare.plan, SHARED, PAIRS, fast)
    assert back
    assert back.plan.forecast == plan.forecast
