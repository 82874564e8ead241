"""Faults from seeds on simulated Macs: recovery keeps the promise."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.coordinator import planner
from cluster.core.errors import Aborted, NotServing
from cluster.core.lap_times import LapTimes
from cluster.core.plan import Plan
from cluster.core.worker import WorkerInfo
from cluster.scheduler import guess_chains
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.guess_window import LapMeter
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.verify_length import Depth
from effort import effort
from faults.scenario import Fault, Kind, Moment, Scenario, pool, scenario
from faults.simulated_time import run_simulated, simulated_now, use_simulated_time
from faults.simulation import NAMES, SPEED, STAGES, Mac, Simulation, simulated
from scheduler.guessers import Oracle

pytestmark = pytest.mark.timeout(240)
FIRST, SEEDS = 5, 55
STOPPED_AT_ONCE = (1113, 1130)
"""Seeds in which an engine is killed, and the one in its place is stopped."""
SLOW = Fault(Kind.DELAY, 1, Moment.TOKEN, 3, True)
"""What a scenario has at least."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's waits, shortened, and by simulated time."""
    use_simulated_time(monkeypatch)
    for name, seconds in SPEED.items():
        monkeypatch.setattr(name, seconds)


def test_whatever_goes_wrong_in_the_simulation_the_promise_is_kept(tmp_path: Path) -> None:
    outcomes = run_simulated(simulated((*range(FIRST, FIRST + SEEDS), *STOPPED_AT_ONCE)))
    broken = []
    for seed, (verdict, history) in outcomes.items():
        if not verdict.kept:
            history.save(tmp_path / f"seed-{seed}.jsonl")
            broken.append(f"seed {seed}: {verdict}; history in {tmp_path}")
    assert not broken, "\n".join(broken)
    assert sum(verdict.requests for verdict, _ in outcomes.values()) >= SEEDS


def guess(monkeypatch: pytest.MonkeyPatch) -> list[Scheduler]:
    """Have every service guess, right and wrong, as far ahead as it may. Return their schedulers.

    In every other epoch, frames have up to three tokens.
    """
    made: list[Scheduler] = []

    def with_rows(epoch: int, capacity: Capacity) -> Capacity:
        costs = (1.0,) * len(capacity.budget)
        return replace(capacity, verify_costs={2: costs, 3: costs} if epoch % 2 else {})

    def guessing(epoch: int, capacity: Capacity, eos: frozenset[int], *_: object) -> Scheduler:
        made.append(Scheduler(epoch, with_rows(epoch, capacity), eos, Oracle(random.Random(len(made)), 0.3)))
        return made[-1]

    def next_capacity(plan: Plan, *rest: Any) -> Capacity:
        return with_rows(plan.epoch, planner.capacity(plan, *rest))

    monkeypatch.setattr("cluster.coordinator.recovery.capacity", next_capacity)
    monkeypatch.setattr(guess_chains, "choose_depth", lambda steps, _, most: Depth(most, max(steps)))
    monkeypatch.setattr("cluster.coordinator.service.Scheduler", guessing)
    monkeypatch.setattr(LapMeter, "times", property(lambda meter: LapTimes((1.0,) * meter._count)))
    monkeypatch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)
    return made


def test_whatever_goes_wrong_between_a_guess_and_its_verdict_the_promise_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac dies, hangs, drains or comes back while guesses are in flight; answers are those without guesses."""
    schedulers = guess(monkeypatch)
    outcomes = run_simulated(simulated(range(FIRST, FIRST + effort(12, 300))))
    for seed, (verdict, history) in outcomes.items():
        history.save(tmp_path / f"seed-{seed}.jsonl")
        assert verdict.kept, f"seed {seed}: {verdict}; history in {tmp_path}"
    counts = [count for each in schedulers for count in each.speculation.counts.by_source.values()]
    assert sum(count.accepted for count in counts) > len(outcomes)
    assert sum(count.voided for count in counts) > len(outcomes)
    assert sum(count.rows for count in counts) > len(outcomes)


def send_every_guess(monkeypatch: pytest.MonkeyPatch) -> list[Scheduler]:
    """Have every service send all guesses that it may. Return their schedulers."""
    made: list[Scheduler] = []

    def noted(*given: Any) -> Scheduler:
        made.append(Scheduler(*given))
        return made[-1]

    monkeypatch.setattr("cluster.coordinator.service.Scheduler", noted)
    monkeypatch.setattr(LapMeter, "times", LapTimes((1.0,) * STAGES))
    monkeypatch.setattr(guess_chains, "choose_window", lambda times, acceptance, most: most)
    return made


def test_whatever_goes_wrong_around_a_draft_model_the_promise_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery takes the draft's Mac, or that leaves itself; answers are those without guesses."""
    schedulers = send_every_guess(monkeypatch)
    outcomes = run_simulated(simulated(range(FIRST, FIRST + effort(12, 300)), drafted=True))
    for seed, (verdict, history) in outcomes.items():
        history.save(tmp_path / f"seed-{seed}.jsonl")
        assert verdict.kept, f"seed {seed}: {verdict}; history in {tmp_path}"
    counts = [count for each in schedulers for count in each.speculation.counts.by_source.values()]
    assert sum(count.accepted for count in counts) > len(outcomes)


def test_a_draft_comes_back_and_goes_to_the_mac_that_is_back_after_a_recovery_took_its_own() -> None:
    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(scenario(0, asked), asked, drafted=True)
        await simulation.open()
        service, macs = simulation.service, simulation.macs

        async def until(worker: str) -> None:
            async with asyncio.timeout(10):
                while service.draft_worker != worker or service.recovery:
                    await asyncio.sleep(0.01)

        try:
            await until("dee")
            macs["dee"].strike(Kind.KILL_WORKER)
            await until("")
            assert "the draft model draft" in service.draft_problem
            await until("dee")
            assert simulation.timeline.recoveries == 0
            macs["bob"].strike(Kind.KILL_WORKER)
            await until("")
            assert [s.worker for s in service.plan.stages] == ["ada", "dee", "cyd"]
            await until("bob")
            assert (simulation.timeline.recoveries, service.draft_problem) == (1, "")
            macs["bob"].draining = True
            async with asyncio.timeout(10):
                while macs["bob"].info().epoch:  # until its memory is free
                    await asyncio.sleep(0.01)
            await until("")
            macs["bob"].draining = False
            await until("bob")
        finally:
            await simulation.close()

    run_simulated(play())


@pytest.mark.parametrize("seed", [FIRST, FIRST + 7])
def test_a_slow_machine_plays_the_same_game(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heartbeats together take longer than the waits for them, on the machine's clock."""

    async def play() -> tuple[list[dict[str, Any]], float]:
        asked = pool(700)
        simulation, began = Simulation(scenario(seed, asked, STAGES), asked), simulated_now()
        assert (await simulation.play()).kept
        return simulation.history.events, simulated_now() - began

    expected = run_simulated(play())
    info = Mac.info

    def slow_info(mac: Mac) -> WorkerInfo:
        time.sleep(SPEED["cluster.coordinator.heartbeat.HEARTBEAT_S"] / 5)
        return info(mac)

    monkeypatch.setattr(Mac, "info", slow_info)
    assert run_simulated(play()) == expected


def first_of_all(simulation: Simulation, strike: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strike before anything is asked, so that no answer can end without what follows."""
    opened = simulation.open

    async def opened_and_struck() -> None:
        await opened()
        strike()

    monkeypatch.setattr(simulation, "open", opened_and_struck)


@pytest.mark.parametrize("stage", range(STAGES))
def test_a_mac_whose_data_port_is_out_of_reach_is_replaced(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeats continue, so only the streams that cannot be opened show that it is unusable."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(Scenario(0, (0, 1), (0.0, 0.0), (SLOW,)), asked)
        walled = simulation.macs[NAMES[stage]]
        first_of_all(simulation, walled.wall, monkeypatch)
        verdict = await simulation.play()
        assert verdict.kept, verdict
        assert {s.worker for s in simulation.service.plan.stages} == {*NAMES} - {walled.name}

    run_simulated(play())


def test_a_spare_that_hangs_before_its_first_token_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 47, once: who was lost with its layers loaded, before the new ring ran, was missed for two minutes."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(Scenario(0, (0, 1), (0.0, 0.0), (SLOW,)), asked)
        first_of_all(simulation, lambda: simulation.macs["cyd"].strike(Kind.KILL_WORKER), monkeypatch)
        spare = simulation.macs["dee"]
        link = spare.link

        async def hang_first(epoch: int, before: WorkerInfo | None) -> None:
            spare.strike(Kind.STOP_ENGINE)
            async with asyncio.timeout(5):
                while not simulation.gone("dee"):
                    await asyncio.sleep(0.01)
            await link(epoch, before)

        monkeypatch.setattr(spare, "link", hang_first)
        verdict = await simulation.play()
        assert verdict.kept, verdict
        assert [s.worker for s in simulation.service.plan.stages] == ["ada", "bob", "cyd"]

    run_simulated(play())


async def drained(simulation: Simulation) -> None:
    """Drain the Mac of stage 1, and look while its layers are loaded elsewhere."""
    await simulation.open()
    service, spare = simulation.service, simulation.macs["dee"]
    try:
        spare.loading.clear()
        simulation.macs["bob"].draining = True
        async with asyncio.timeout(10):
            while service.move is None:
                await asyncio.sleep(0.01)
        assert (service.move.doing, service.move.expected_s > 0) == ("moving layers to dee", True)
        assert "bob is being drained" in service.move.reason
        assert service.recovery is None
        spare.loading.set()
        async with asyncio.timeout(10):
            while service.move:
                await asyncio.sleep(0.01)
        assert ([s.worker for s in service.plan.stages], simulation.timeline.recoveries) == (["ada", "dee", "cyd"], 0)
    finally:
        await simulation.close()


def test_a_planned_move_says_what_it_does_and_counts_as_no_loss() -> None:
    async def play() -> None:
        asked = pool(700)
        await drained(Simulation(scenario(0, asked), asked))

    run_simulated(play())


@pytest.mark.parametrize("end", ["crash", "undo", "close"])
def test_whoever_waits_for_a_drain_is_told_its_end(end: str) -> None:
    """The worker crashes in the middle of it, the drain is undone, or another model is loaded."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(scenario(0, asked), asked)
        await simulation.open()
        service, bob = simulation.service, simulation.macs["bob"]
        try:
            simulation.macs["dee"].loading.clear()
            bob.draining = True
            drain = asyncio.create_task(service.move_away("bob"))
            async with asyncio.timeout(10):
                while service.move is None:
                    await asyncio.sleep(0.01)
                if end == "crash":
                    bob.draining = False  # its daemon was started again
                    bob.strike(Kind.KILL_WORKER)
                    simulation.macs["dee"].loading.set()
                    await drain  # its layers are elsewhere
                    assert "bob" not in [s.worker for s in service.plan.stages]
                    return
                if end == "undo":
                    service.cancel_move_away("bob")
                    with pytest.raises(Aborted, match="undone"):
                        await drain
        finally:
            await simulation.close()
        if end == "close":
            with pytest.raises(NotServing):
                await drain

    run_simulated(play())


def test_a_planned_move_to_a_mac_that_hangs_does_not_hold_a_recovery_up() -> None:
    """The old ring breaks while layers are loaded elsewhere. Requests must not wait for that load."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(scenario(0, asked), asked)
        await simulation.open()
        service = simulation.service
        try:
            simulation.macs["dee"].loading.clear()
            simulation.macs["bob"].draining = True
            async with asyncio.timeout(10):
                while service.move is None:
                    await asyncio.sleep(0.01)
                simulation.macs["bob"].draining = False
                simulation.macs["cyd"].strike(Kind.RESET)
                while not simulation.timeline.recoveries:
                    await asyncio.sleep(0.01)
            assert [s.worker for s in service.plan.stages] == ["ada", "bob", "cyd"]
        finally:
            simulation.macs["dee"].loading.set()
            await simulation.close()

    run_simulated(play())


@pytest.mark.parametrize("spare", ["dee", "bob"])
def test_a_refused_epoch_leads_to_a_larger_one(spare: str) -> None:
    """A worker whose engine holds an unknown newer epoch is as usable as others."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(scenario(0, asked), asked)
        await simulation.open()
        service, newest = simulation.service, simulation.epochs.last + 86_400_000
        simulation.macs[spare].newest = newest
        try:
            simulation.macs["bob"].strike(Kind.KILL_WORKER if spare == "dee" else Kind.KILL_ENGINE)
            async with asyncio.timeout(10):
                while not simulation.timeline.recoveries:
                    await asyncio.sleep(0.01)
            assert [s.worker for s in service.plan.stages] == ["ada", spare, "cyd"]
            assert service.plan.epoch > newest
        finally:
            await simulation.close()

    run_simulated(play())


def test_a_move_that_fails_before_the_switch_takes_nothing_down() -> None:
    """The spare leaves while a leaver's layers are loaded there: they go to those who are left, without a recovery."""

    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(replace(scenario(0, asked), announced=True), asked)
        await simulation.open()
        service, spare = simulation.service, simulation.macs["dee"]
        try:
            spare.loading.clear()
            simulation.macs["bob"].draining = True
            async with asyncio.timeout(10):
                while service.move is None:
                    await asyncio.sleep(0.01)
                spare.strike(Kind.LEAVE_SPARE)
                while "bob" in [s.worker for s in service.plan.stages]:
                    await asyncio.sleep(0.01)
            assert ([s.worker for s in service.plan.stages], simulation.timeline.recoveries) == (["ada", "cyd"], 0)
        finally:
            spare.loading.set()
            await simulation.close()

    run_simulated(play())


def test_an_error_that_nobody_foresaw_does_not_end_the_task_that_requests_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        asked = pool(700)
        simulation = Simulation(scenario(0, asked), asked)
        await simulation.open()
        service = simulation.service
        foreseen = service._move_draining

        async def fail() -> None:
            monkeypatch.setattr(service, "_move_draining", foreseen)
            raise ZeroDivisionError("unforeseen")

        try:
            monkeypatch.setattr(service, "_move_draining", fail)
            async with asyncio.timeout(10):
                while not simulation.timeline.recoveries:
                    await asyncio.sleep(0.01)
        finally:
            await simulation.close()

    run_simulated(play())
