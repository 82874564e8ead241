"""Run many seeds, on one fleet or on several at once, each in its own process."""

from __future__ import annotations

import json
import math
import random
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from faults.campaign import Campaign, Summary, complaint
from faults.deployment_fleet import DeploymentFleet, deployment_pool, process_scenario
from faults.fleet import NAMES, Fleet
from faults.group_fleet import GroupFleet, group_scenario
from faults.scenario import Scenario, kill, scenario

BLOCK = 50


@dataclass(frozen=True)
class Game:
    """What to run, on which workers, and until when (monotonic seconds, the same in all of a machine's processes)."""

    kills: bool = False
    names: tuple[str, ...] = NAMES
    until: float = math.inf
    speculate: bool = False
    deployments: int = 1
    groups: bool = False

    def campaign(self, folder: Path) -> Campaign:
        if self.groups:
            pair = GroupFleet(folder)
            return Campaign(pair, deployment_pool(pair))
        if self.deployments > 1:
            fleet = DeploymentFleet(folder, self.deployments)
            return Campaign(fleet, deployment_pool(fleet))
        return Campaign(Fleet(folder, names=self.names, speculate=self.speculate))

    def scenario(self, seed: int, campaign: Campaign) -> Scenario:
        if self.groups:
            return group_scenario(seed, campaign)
        if self.deployments > 1:
            return process_scenario(seed, campaign)
        return (kill if self.kills else scenario)(seed, campaign.asked, campaign.fleet.stages)


def fleets(count: int, folder: Path, seeds: Sequence[int], game: Game) -> Summary:
    """Play on several fleets, each in a process of its own; more than one keep a folder each, and get a mix of seeds:
    every second kill is a worker's, which takes three times as long as an engine's to mend.
    """
    if count == 1:
        return run(folder, seeds, game)
    whole = Summary()
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        mixed = random.Random(0).sample(seeds, len(seeds))
        shares = [pool.submit(run, folder / f"fleet-{i}", mixed[i::count], game) for i in range(count)]
        for share in shares:
            whole.merge(share.result())
    return whole


def in_blocks(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """Those with announced workers together, and those without, a block at a time: between them the coordinator is
    started again.
    """
    blocks = [scenarios[at : at + BLOCK] for at in range(0, len(scenarios), BLOCK)]
    return [s for i, block in enumerate(blocks) for s in sorted(block, key=lambda s: s.announced, reverse=i % 2 == 1)]


def run(folder: Path, seeds: Sequence[int], game: Game) -> Summary:
    """Play on one fleet, until the time is over. A fleet that does not start or does not mend ends early."""
    folder.mkdir(parents=True, exist_ok=True)
    summary, began = Summary(unplayed=len(seeds)), time.monotonic()
    campaign: Campaign | None = None
    try:
        campaign = game.campaign(folder)
        for played in in_blocks([game.scenario(seed, campaign) for seed in seeds]):
            if time.monotonic() >= game.until:
                break
            _play(campaign, played, summary, folder)
            if summary.seeds % 25 == 0:
                rate = (time.monotonic() - began) / summary.seeds
                print(f"{summary.seeds} of {len(seeds)} seeds, {rate:.1f} s each", file=sys.stderr, flush=True)
    except Exception as error:  # the edge of this fleet: the others' results count all the same
        traceback.print_exc()
        summary.ended_early.append(f"{folder.name}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        if campaign:
            campaign.fleet.close()
    return summary


def _play(campaign: Campaign, played: Scenario, summary: Summary, folder: Path) -> None:
    outcome = campaign.play(played)
    summary.add(outcome)
    summary.unplayed -= 1
    with (folder / "outcomes.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(outcome.facts()) + "\n")
    if not outcome.kept:
        print(complaint(outcome, folder), file=sys.stderr, flush=True)
