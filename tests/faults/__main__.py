"""``ops/chaos``: many seeds on one fleet, a line for each that breaks the promise, a summary at the end."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from faults.campaign import Campaign, Summary, complaint
from faults.fleet import NAMES, Fleet
from faults.scenario import KILLS, Scenario, kill, scenario
from faults.soak import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="ops/chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them")
    parser.add_argument("--fleets", type=int, default=1, help="how many fleets play at once, each its share")
    parser.add_argument("--kills", action="store_true", help=f"SIGKILL at every token instead: seeds 0 to {KILLS - 1}")
    parser.add_argument("--no-spare", action="store_true", help="as many workers as stages")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="no faults: answer and cancel for so long")
    parser.add_argument("--cycles", type=int, metavar="N", help="no faults: connect and cancel so often")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
    parser.add_argument("--keep", type=Path, help="keep logs, outcomes.jsonl and failed seeds' histories here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="macpipe-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.soak or options.cycles:
            return soak(folder, options)
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        game = Game(options.kills, NAMES[: -1 if options.no_spare else None], options.minutes)
        summary = fleets(options.fleets, folder, seeds, game)
    print(json.dumps(summary.facts()) if options.json else table(summary))
    return 1 if summary.failed else 0


def soak(folder: Path, options: argparse.Namespace) -> int:
    """What every process takes while clients come and go. 1 where it grows, or an answer differs."""
    made = Soak(folder)
    try:
        found = made.cycles(options.cycles) if options.cycles else made.minutes(options.soak)
    finally:
        made.close()
    facts = found.facts()
    print(json.dumps(facts) if options.json else "\n".join(f"{name:14} {value}" for name, value in facts.items()))
    return 0 if found.flat and not (found.differing or found.failed) else 1


@dataclass(frozen=True)
class Game:
    """What is played, by which workers, and for how long at most."""

    kills: bool = False
    names: tuple[str, ...] = NAMES
    minutes: float | None = None

    def scenario(self, seed: int, campaign: Campaign) -> Scenario:
        return (kill if self.kills else scenario)(seed, campaign.asked, campaign.fleet.stages)


def fleets(count: int, folder: Path, seeds: range, game: Game) -> Summary:
    """Play on several fleets, each in a process of its own; more than one keep a folder each."""
    if count == 1:
        return run(folder, seeds, game)
    whole = Summary()
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        shares = [pool.submit(run, folder / f"fleet-{i}", seeds[i::count], game) for i in range(count)]
        for share in shares:
            whole.merge(share.result())
    return whole


def run(folder: Path, seeds: range, game: Game) -> Summary:
    folder.mkdir(parents=True, exist_ok=True)
    fleet, summary, began = Fleet(folder, names=game.names), Summary(), time.monotonic()
    try:
        campaign = Campaign(fleet)
        for done, seed in enumerate(seeds, 1):
            if game.minutes and time.monotonic() - began > 60 * game.minutes:
                break
            outcome = campaign.play(game.scenario(seed, campaign))
            summary.add(outcome)
            with (folder / "outcomes.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(outcome.facts()) + "\n")
            if not outcome.kept:
                print(complaint(outcome, folder), file=sys.stderr, flush=True)
            if done % 25 == 0:
                rate = (time.monotonic() - began) / done
                print(f"{done} of {len(seeds)} seeds, {rate:.1f} s each", file=sys.stderr, flush=True)
    finally:
        fleet.close()
    return summary


def table(summary: Summary) -> str:
    return "\n".join(f"{name:14} {value}" for name, value in summary.facts().items())


if __name__ == "__main__":
    sys.exit(main())
