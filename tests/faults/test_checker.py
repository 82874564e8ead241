"""The checker: it detects every way of breaking the promise, and reports nothing if the promise is kept."""

from __future__ import annotations

import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from faults.campaign import Campaign, Summary
from faults.checker import SLACK_S, check
from faults.games import BLOCK, Game, in_blocks, run
from faults.history import History
from faults.monitor import StatusMonitor
from faults.scenario import HARMLESS, LINK, Kind, Moment, pool, scenario

EXPECTED = {"r": (5, 6, 7)}
DEADLINE_S = 10.0


def history(*events: tuple[Any, ...]) -> History:
    made = History()
    for t, event, *facts in events:
        made.events.append({"t": t, "event": event, "request": "r", **(facts[0] if facts else {})})
    return made


SENT, ACCEPTED = (0.0, "sent"), (0.1, "accepted")


def token(index: int, token: int, t: float = 1.0) -> tuple[Any, ...]:
    return (t, "token", {"index": index, "token": token})


WHOLE = (SENT, ACCEPTED, token(0, 5), token(1, 6), token(2, 7), (2.0, "finish", {"reason": "length"}))


def test_a_kept_promise() -> None:
    verdict = check(history(*WHOLE), EXPECTED, DEADLINE_S)
    assert verdict.kept
    assert verdict.requests == 1


def test_a_refusal_with_a_type_is_no_broken_promise() -> None:
    refused = history(SENT, (0.2, "error", {"reason": "BUSY"}))
    assert check(refused, EXPECTED, DEADLINE_S).kept
    assert not check(history(SENT), EXPECTED, DEADLINE_S).kept


@pytest.mark.parametrize(
    ("events", "broken"),
    [
        ((*WHOLE[:3], WHOLE[4]), "differing"),
        ((*WHOLE[:3], WHOLE[2], *WHOLE[3:]), "differing"),
        ((*WHOLE[:2], WHOLE[3], WHOLE[2], *WHOLE[4:]), "differing"),
        ((*WHOLE[:3], token(1, 9), *WHOLE[4:]), "differing"),
        ((*WHOLE[:4], WHOLE[5]), "differing"),
        ((*WHOLE, WHOLE[5]), "differing"),
        ((*WHOLE, token(3, 8)), "differing"),
        (WHOLE[:4], "hung"),
        ((*WHOLE[:5], (DEADLINE_S + SLACK_S + 1, "finish")), "hung"),
        ((*WHOLE[:4], (2.0, "error", {"reason": "WORKER_LOST", "sentence": "gone"})), "lost"),
    ],
)
def test_a_broken_promise(events: tuple[tuple[Any, ...], ...], broken: str) -> None:
    verdict = check(history(*events), EXPECTED, DEADLINE_S)
    assert getattr(verdict, broken), verdict


@pytest.mark.parametrize(
    ("took_s", "error", "kept"), [(1.9, "", True), (2.1, "", False), (0.1, "UNREACHABLE: nobody answers", False)]
)
def test_a_status_that_is_not_answered_in_time_breaks_the_promise(took_s: float, error: str, kept: bool) -> None:
    made = history(*WHOLE)
    made.note("status", took_s=took_s, error=error)
    verdict = check(made, EXPECTED, DEADLINE_S)
    assert verdict.kept is kept
    assert bool(verdict.slow) is not kept


def test_a_status_without_an_answer_is_seen_before_it_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monitor = StatusMonitor(f"127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()
        (early,) = monitor.take()
        (late,) = monitor.take()
        assert (late.began, late.error) == (early.began, "")
        assert late.took_s > early.took_s
        connection.close()
    monitor.close()
    assert all(answer.error for answer in monitor.take()), "a call without an answer is left"


def test_scenarios_are_played_in_blocks_with_few_changes_of_how_workers_are_found() -> None:
    made = [scenario(seed, pool(500)) for seed in range(3 * BLOCK)]
    played = in_blocks(made)
    assert sorted(s.seed for s in played) == list(range(3 * BLOCK))
    assert sum(a.announced != b.announced for a, b in pairwise(played)) == 3


class NoFleet(Game):
    """One whose workers do not start."""

    def campaign(self, folder: Path) -> Campaign:
        raise AssertionError("the fleet does not mend")


def test_a_fleet_that_ends_early_is_told_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The results of other fleets are not lost with it."""
    ended = run(tmp_path / "fleet-1", range(3), NoFleet())
    assert "does not mend" in capsys.readouterr().err, "with its traceback"
    whole = Summary(seeds=5)
    assert whole.good
    whole.merge(ended)
    assert not whole.good
    assert (whole.seeds, whole.unplayed) == (5, 3)
    assert whole.facts()["ended_early"] == ["fleet-1: AssertionError: the fleet does not mend"]


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = history(*WHOLE)
    made.save(tmp_path / "deep" / "h.jsonl")
    assert History.load(tmp_path / "deep" / "h.jsonl").events == made.events


def test_a_seed_gives_one_scenario_and_many_seeds_give_every_kind() -> None:
    asked = pool(500)
    made = [scenario(seed, asked) for seed in range(600)]
    assert made == [scenario(seed, pool(500)) for seed in range(600)]
    faults = [f for s in made for f in s.faults]
    assert {f.kind for f in faults} == set(Kind)
    assert {f.moment for f in faults} == set(Moment)
    assert all(s.faults[0].kind not in HARMLESS for s in made if len(s.faults) > 1)
    assert {s.announced for s in made} == {True, False}
    assert not any(f.kind in LINK for s in made if s.announced for f in s.faults)
