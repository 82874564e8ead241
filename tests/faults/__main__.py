"""``ops/chaos``: many seeds on one fleet, a line for each that breaks the promise, a summary at the end."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from faults.campaign import Campaign, Summary, complaint
from faults.fleet import Fleet


def main() -> int:
    parser = argparse.ArgumentParser(prog="ops/chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
    parser.add_argument("--keep", type=Path, help="keep logs and the histories of failed seeds in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="macpipe-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        summary = run(folder, range(options.first_seed, options.first_seed + options.seeds), options.minutes)
    print(json.dumps(summary.facts()) if options.json else table(summary))
    return 1 if summary.failed else 0


def run(folder: Path, seeds: range, minutes: float | None = None) -> Summary:
    fleet, summary, began = Fleet(folder), Summary(), time.monotonic()
    try:
        campaign = Campaign(fleet)
        for done, seed in enumerate(seeds, 1):
            if minutes and time.monotonic() - began > 60 * minutes:
                break
            outcome = campaign.run(seed)
            summary.add(outcome)
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
