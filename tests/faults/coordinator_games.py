"""Play seeds on several fleets with leaders and standbys at once, each fleet in a process of its own, for a while."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from faults.campaign import quantiles
from faults.coordinator_campaign import CoordinatorCampaign, CoordinatorOutcome
from faults.coordinator_fleet import CoordinatorFleet, Unmended
from faults.coordinator_scenario import Blow, CoordinatorScenario, coordinator_scenario, leader_kill
from faults.hosts import FleetHost, loopback_hosts, separate_hosts

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.sharedctypes import Synchronized

MACS = 3
GRACE_S = 60.0
"""How long a seed that has begun may take beyond the end of the time."""


@dataclass(frozen=True)
class CoordinatorGame:
    """What to play. ``loopback``: without namespaces, and so without cut cables. ``end``: by ``time.monotonic``."""

    folder: Path
    replicate: str = "sync"
    kills: bool = False
    loopback: bool = False
    end: float = float("inf")

    def hosts(self) -> AbstractContextManager[Sequence[FleetHost]]:
        return loopback_hosts(MACS) if self.loopback else separate_hosts(MACS)

    def scenario(self, seed: int) -> CoordinatorScenario:
        if self.kills:
            return leader_kill(seed)
        return coordinator_scenario(seed, [blow for blow in Blow if not self.loopback or blow is not Blow.CUT])


@dataclass
class CoordinatorSummary:
    """The output of ``ops/chaos --coordinators``, of the outcomes' facts."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    unmended: list[int] = field(default_factory=list)
    """Seeds after whose faults, or those before, the Macs did not come back to a whole."""
    unfinished: list[int] = field(default_factory=list)
    """Seeds that were being played when the time was over."""
    crashed: int = 0
    """Fleets whose own process failed."""
    unplayed: int = 0
    """Seeds for which there was no time."""

    @property
    def good(self) -> bool:
        """Whether some seeds were played, and all of these kept the promise."""
        return bool(self.outcomes) and not self.failed and not self.crashed

    @property
    def failed(self) -> list[int]:
        """The seeds that broke the promise."""
        broken = [o["seed"] for o in self.outcomes if o["lost"] or o["hung"] or o["differing"]]
        return sorted([*broken, *self.unmended])

    def facts(self) -> dict[str, object]:
        kinds = sorted({o["kind"] for o in self.outcomes})
        return {
            "seeds": len(self.outcomes),
            "requests": sum(o["requests"] for o in self.outcomes),
            **{name: self._count(name) for name in ("lost", "hung", "differing")},
            "ended_by_two_faults": self._count("ended"),
            "refused": self._count("refused"),
            "resume_ms": quantiles(self._resumed()),
            "resume_ms_by_kind": {kind: quantiles(self._resumed(kind)) for kind in kinds},
            "failed_seeds": self.failed,
            "unmended_seeds": sorted(self.unmended),
            "unfinished_seeds": sorted(self.unfinished),
            "unplayed": self.unplayed,
            "crashed_fleets": self.crashed,
        }

    def _count(self, name: str) -> int:
        return sum(len(o[name]) for o in self.outcomes)

    def _resumed(self, kind: str = "") -> list[float]:
        return [o["resume_ms"] for o in self.outcomes if kind in ("", o["kind"]) and o["resume_ms"] is not None]


def play_coordinators(seeds: range, fleets: int, game: CoordinatorGame) -> CoordinatorSummary:
    """Play on that many fleets. Each takes the next seed when it is free, so a time that ends leaves out the last.

    SIGTERM ends it as well. Call it on the main thread.
    """
    context, summary = get_context("spawn"), CoordinatorSummary()
    results: Queue[tuple[str, Any]] = context.Queue()
    coming = context.Value("q", seeds.start)
    processes = [
        context.Process(target=_play, args=(game, number, seeds.stop, coming, results)) for number in range(fleets)
    ]
    for process in processes:
        process.start()
    playing, told = set[int](), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        while any(process.is_alive() for process in processes) and not told.is_set():
            if time.monotonic() >= game.end + GRACE_S:
                break
            _take(results, summary, playing, game)
    finally:
        for process in processes:
            _end(process)
    while not results.empty():
        _take(results, summary, playing, game)
    summary.unfinished = sorted(playing)
    summary.unplayed = len(seeds) - len(summary.outcomes) - len(summary.unmended) - len(playing)
    return summary


def _take(
    results: Queue[tuple[str, Any]], summary: CoordinatorSummary, playing: set[int], game: CoordinatorGame
) -> None:
    with suppress(Empty):
        kind, found = results.get(timeout=0.5)
        match kind:
            case "begun":
                playing.add(found)
            case "unmended":
                playing.discard(found)
                summary.unmended.append(found)
            case "crashed":
                summary.crashed += 1
                print(found, file=sys.stderr, flush=True)
            case _:
                playing.discard(found["seed"])
                summary.outcomes.append(found)
                with (game.folder / "outcomes.jsonl").open("a", encoding="utf-8") as out:
                    out.write(json.dumps(found) + "\n")


def _end(process: SpawnProcess) -> None:
    """Have a fleet's process close its fleet, and wait for it."""
    if process.is_alive():
        process.terminate()
    process.join(30)
    if process.is_alive():
        process.kill()


def _play(
    game: CoordinatorGame, number: int, stop: int, coming: Synchronized[int], results: Queue[tuple[str, Any]]
) -> None:
    """Play one seed after the other, in this process; on a new fleet after one that does not mend."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent, tries = parent_process(), 0

    def has_parent() -> bool:
        return parent is not None and parent.is_alive()

    def take() -> int | None:
        with coming.get_lock():
            if coming.value >= stop or time.monotonic() >= game.end or not has_parent():
                return None
            coming.value += 1
            return coming.value - 1

    try:
        while time.monotonic() < game.end and coming.value < stop and has_parent():
            tries += 1
            folder = game.folder / f"fleet-{number}-{tries}"
            _play_until_unmended(game, folder, take, results)
    except Exception as e:  # top of the process
        results.put(("crashed", f"fleet {number}: {type(e).__name__}: {e}"))
        raise


def _play_until_unmended(
    game: CoordinatorGame, folder: Path, take: Callable[[], int | None], results: Queue[tuple[str, Any]]
) -> None:
    folder.mkdir(parents=True)
    with game.hosts() as hosts:
        fleet = CoordinatorFleet(folder, hosts, game.replicate)
        try:
            campaign = CoordinatorCampaign(fleet)
            while (seed := take()) is not None:
                results.put(("begun", seed))
                try:
                    outcome = campaign.play(game.scenario(seed))
                except Unmended as e:
                    print(f"seed {seed}: {e}", file=sys.stderr, flush=True)
                    results.put(("unmended", seed))
                    return
                results.put(("played", outcome.facts()))
                _report(outcome, folder)
        finally:
            fleet.close()


def _report(outcome: CoordinatorOutcome, folder: Path) -> None:
    """Keep the history of a seed in which an answer was not completed, and print what broke the promise."""
    facts = outcome.facts()
    broken = [*facts["lost"], *facts["hung"], *facts["differing"]]
    if broken or facts["ended"] or facts["refused"]:
        path = folder / f"seed-{facts['seed']}.jsonl"
        outcome.history.save(path)
        if broken:
            print(
                f"seed {facts['seed']} ({facts['kind']}: {'; '.join(facts['faults'])}): {broken}; history in {path}",
                file=sys.stderr,
                flush=True,
            )
