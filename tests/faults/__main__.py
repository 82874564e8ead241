"""``ops/chaos``: run many seeds on one fleet; print a line for each that breaks the promise, and a summary."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from faults.agent_soak import AgentSoak
from faults.campaign import Summary
from faults.coordinator_games import CoordinatorGame, play_coordinators
from faults.fleet import NAMES
from faults.games import Game, fleets
from faults.models_soak import ModelsSoak
from faults.scenario import KILLS
from faults.soak import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="ops/chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them")
    parser.add_argument("--fleets", type=int, default=1, help="how many fleets play at once, each its share")
    parser.add_argument("--kills", action="store_true", help=f"SIGKILL at every token instead: seeds 0 to {KILLS - 1}")
    parser.add_argument("--no-spare", action="store_true", help="as many workers as stages")
    parser.add_argument("--speculate", action="store_true", help="guess the answers' tokens, many of them wrong")
    parser.add_argument("--deployments", type=int, default=1, metavar="N", help="several models, one with two replicas")
    parser.add_argument("--groups", action="store_true", help="two stages, each a group of two workers, and a spare")
    parser.add_argument("--coordinators", action="store_true", help="leader, standby, worker and pairs are hit (root)")
    parser.add_argument("--replicate", choices=("sync", "async"), default="sync", help="with --coordinators")
    parser.add_argument(
        "--loopback", action="store_true", help="with --coordinators: no namespaces, no cables, no root"
    )
    parser.add_argument("--minutes", type=float, help="begin no seed after so long; one takes up to two")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="no faults: answer and cancel for so long")
    parser.add_argument("--cycles", type=int, metavar="N", help="no faults: connect and cancel so often")
    parser.add_argument("--agents", type=float, metavar="MINUTES", help="no faults: sessions of agents for so long")
    parser.add_argument("--models", type=float, metavar="MINUTES", help="no faults: models come and go for so long")
    parser.add_argument("--sessions", type=Path, nargs="+", default=[], metavar="FILE", help="recordings for --agents")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
    parser.add_argument("--keep", type=Path, help="keep logs, outcomes.jsonl and failed seeds' histories here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="macpipe-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.agents:
            return agents(folder, options)
        if options.models:
            return models(folder, options)
        if options.soak or options.cycles:
            return soak(folder, options)
        if options.coordinators:
            return coordinators(folder, options)
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        names = NAMES[: -1 if options.no_spare else None]
        until = time.monotonic() + 60 * (options.minutes or math.inf)
        game = Game(options.kills, names, until, options.speculate, options.deployments, options.groups)
        summary = fleets(options.fleets, folder, seeds, game)
    print(json.dumps(summary.facts()) if options.json else table(summary))
    return 0 if summary.good else 1


def soak(folder: Path, options: argparse.Namespace) -> int:
    """Print the resources of every process while clients come and go. Return 1 if they grow, or an answer differs."""
    made = Soak(folder)
    try:
        found = made.cycles(options.cycles) if options.cycles else made.minutes(options.soak)
    finally:
        made.close()
    _print(found.facts(), options.json)
    return 0 if found.flat and not (found.differing or found.failed) else 1


def agents(folder: Path, options: argparse.Namespace) -> int:
    """Print what agents' sessions needed. Return 1 if a process grew, prefixes outgrew their budget or one failed."""
    os.environ["MACPIPE_HOME"] = str(folder / "state")  # where the cluster's certificates are
    made = AgentSoak(folder, recordings=options.sessions)
    try:
        found = made.minutes(options.agents)
    finally:
        made.close()
    _print(found.facts(), options.json)
    return 0 if found.good else 1


def models(folder: Path, options: argparse.Namespace) -> int:
    """Print what models that come and go needed. Return 1 if a process grew, or an answer failed or differs."""
    made = ModelsSoak(folder)
    try:
        found = made.minutes(options.models)
    finally:
        made.close()
    _print(found.facts(), options.json)
    return 0 if found.good else 1


def coordinators(folder: Path, options: argparse.Namespace) -> int:
    """Play seeds on Macs with a leader and a standby; with --kills, the leader alone.

    Return 1 if one failed, or if none was played.
    """
    began = time.monotonic()
    end = began + 60 * (options.minutes or float("inf"))
    game = CoordinatorGame(folder, options.replicate, options.kills, options.loopback, end)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    summary = play_coordinators(seeds, options.fleets, game)
    _print(summary.facts() | {"minutes": round((time.monotonic() - began) / 60, 1)}, options.json)
    return 0 if summary.good else 1


def _print(facts: Mapping[str, object], as_json: bool) -> None:
    print(json.dumps(facts) if as_json else "\n".join(f"{name:14} {value}" for name, value in facts.items()))


def table(summary: Summary) -> str:
    return "\n".join(f"{name:14} {value}" for name, value in summary.facts().items())


if __name__ == "__main__":
    sys.exit(main())
