"""Run many seeds, on one fleet or on several at once, each in its own process."""

from __future__ import annotations

import json
import random
import sys
import time
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
    """What to run, on which workers, and for how long at most."""

    kills: bool = False
    names: tuple[str, ...] = NAMES
    minutes: float | None = None
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
    folder.mkdir(parents=True, exist_ok=True)
    campaign, summary, began = game.campaign(folder), Summary(), time.monotonic()
    try:
        for done, played in enumerate(in_blocks([game.scenario(seed, campaign) for seed in seeds]), 1):
            if game.minutes and time.monotonic() - began > 60 * game.minutes:
                break
            outcome = campaign.play(played)
            summary.add(outcome)
            with (folder / "outcomes.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(outcome.facts()) + "\n")
            if not outcome.kept:
                print(complaint(outcome, folder), file=sys.stderr, flush=True)
            if done % 25 == 0:
                rate = (time.monotonic() - began) / done
                print(f"{done} of {len(seeds)} seeds, {rate:.1f} s each", file=sys.stderr, flush=True)
    finally:
        campaign.fleet.close()
    return summary
