"""``ops/fuzz --cost``: print the cost of the most expensive inputs per entry; exit with 1 above a bound.

With ``--replay`` the inputs kept in ``tests/fuzz/corpus/cost`` are run, and their outcomes compared. Inputs above
the bounds are written to ``--keep``; they belong into that folder, under their target.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from random import Random
from typing import Any, Final

from fuzz.cost.measure import CPU_S, LOOP_MS, MEMORY_MIB, Cost
from fuzz.cost.recipe import Recipe, shown
from fuzz.cost.replay import kept, replay
from fuzz.cost.search import Found, Search, Tried
from fuzz.cost.target import CostTarget
from fuzz.cost.targets import TARGETS

INPUTS: Final = 4_000
FIGURES: Final = ("loop_ms", "cpu_s", "mib", "child_cpu_s", "child_mib")
LISTED: Final = 3
"""Inputs that a target's facts list."""


def main() -> int:
    options = _options()
    chosen = [TARGETS[name] for name in options.target or TARGETS]
    if options.replay or options.closed:
        return _replay(chosen, closed=options.closed)
    each = max(1, options.inputs // len(chosen))
    began, rows, bad = time.monotonic(), [], False
    if not options.json:
        print(_head())
    for target in chosen:
        print(f"{target.name}: {each} inputs", file=sys.stderr, flush=True)
        rows.append(_in_a_child(target.name, each, options))
        bad |= rows[-1]["over"] or bool(rows[-1]["faults"])
        if not options.json:
            print("\n".join(_lines(rows[-1])), flush=True)
    facts = {"seed": options.seed, "seconds": round(time.monotonic() - began), "targets": rows}
    if options.json:
        print(json.dumps(facts))
    else:
        over = sum(row["over"] for row in rows)
        inputs = sum(row["inputs"] for row in rows)
        print(f"{inputs} inputs in {facts['seconds']} s from seed {options.seed}; {over} of {len(rows)} entries over")
    return 1 if bad else 0


def _replay(chosen: Sequence[CostTarget], *, closed: bool) -> int:
    facts = [replay(target, closed=closed) for target in chosen]
    print(json.dumps(facts))
    return 1 if any(one["wrong"] for one in facts) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops/fuzz --cost", description=__doc__)
    parser.add_argument(
        "--inputs", type=int, default=INPUTS, metavar="N", help=f"how many in all; {INPUTS:,} by default"
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), metavar="T", help=f"one of {', '.join(TARGETS)}"
    )
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**32), help="repeat the randomness of an earlier search"
    )
    parser.add_argument(
        "--seconds", type=float, default=inf, metavar="S", help="try no further input of a target after so long"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    parser.add_argument("--replay", action="store_true", help="try the kept inputs alone, and compare outcomes")
    parser.add_argument("--closed", action="store_true", help="the same, but give none to the sandbox")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings/cost"), help="folder for what is over")
    return parser.parse_args()


def _known(target: str) -> list[tuple[str, Recipe]]:
    return [(one.name, one.recipe) for one in kept(target)]


def _in_a_child(name: str, inputs: int, options: argparse.Namespace) -> dict[str, Any]:
    """Search in a child process, which frees the target's memory when it ends."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(read)
            found = Search(TARGETS[name], Random(f"{options.seed} {name}")).run(_known(name), inputs, options.seconds)
            _keep(found, options.keep)
            with open(write, "w") as out:  # noqa: PTH123  # a descriptor
                out.write(json.dumps(_row(found)))
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with open(read) as told:  # noqa: PTH123  # a descriptor
        said = told.read()
    os.waitpid(child, 0)
    if not said:
        raise SystemExit(f"the search of {name} failed")
    return dict(json.loads(said))


def _keep(found: Found, folder: Path) -> None:
    over = [one for one in found.dearest if one.score > 1]
    for number, tried in enumerate((*over[:LISTED], *found.faults[:LISTED])):
        (folder / found.target.name).mkdir(parents=True, exist_ok=True)
        file = folder / found.target.name / f"{number}-{tried.name.replace(' ', '-').replace('/', '-')}.json"
        file.write_text(json.dumps({"recipe": tried.recipe, "outcome": tried.cost.outcome, **_cost(tried.cost)}))


def _row(found: Found) -> dict[str, Any]:
    return {
        "target": found.target.name,
        "bounds": found.target.bounds,
        "inputs": found.inputs,
        "over": found.over,
        "alone": [_tried(one) for one in _leaders(found.dearest)],
        "at_once": found.target.at_once,
        "together": _cost(found.together) if found.together else None,
        "faults": [_tried(one) for one in found.faults[:LISTED]],
        "outcomes": {one.name: one.cost.outcome for one in found.dearest} if not found.inputs > 64 else {},
    }


def _leaders(dearest: Sequence[Tried]) -> list[Tried]:
    """The dearest by each figure, then the dearest over all; each once."""
    figures = [lambda c, f=f: getattr(c, f) for f in FIGURES]
    firsts = [max(dearest, key=lambda one: figure(one.cost)) for figure in figures] if dearest else []
    return list({id(one): one for one in (*dearest[:1], *firsts, *dearest[1:LISTED])}.values())[: LISTED + 1]


def _tried(one: Tried) -> dict[str, Any]:
    return {"name": one.name, "input": shown(one.recipe), "outcome": one.cost.outcome, **_cost(one.cost)}


def _cost(cost: Cost) -> dict[str, Any]:
    return {figure: round(getattr(cost, figure), 3) for figure in FIGURES} | {"killed": cost.killed}


def _head() -> str:
    return (
        f"{'entry':22} {'inputs':>6} {'loop ms':>8} {'CPU s':>7} {'MiB':>7} {'child s':>7} {'MiB':>7}  (at most "
        f"{LOOP_MS:.0f} ms, {CPU_S} s, {MEMORY_MIB:.0f} MiB; child processes as their limits allow)"
    )


def _lines(row: dict[str, Any]) -> Iterable[str]:
    """The dearest by each figure together, then which inputs they are."""
    worst = {name: max((one[name] for one in row["alone"]), default=0.0) for name in FIGURES}
    verdict = "OVER" if row["over"] else "PASS"
    yield f"{row['target']:22} {row['inputs']:>6} {_figures(worst)}  {verdict}"
    if row["together"]:
        yield f"{'':22} {'x' + str(row['at_once']):>6} {_figures(row['together'])}  at once"
    for one in row["alone"] if row["over"] else row["alone"][:1]:
        yield f"{'':29} {_figures(one)}  {one['outcome']}: {one['name']}: {one['input']}"
    for one in row["faults"]:
        yield f"{'':29} FAULT {one['outcome']}: {one['name']}: {one['input']}"


def _figures(cost: dict[str, float]) -> str:
    return "{:>8.1f} {:>7.3f} {:>7.1f} {:>7.2f} {:>7.1f}".format(*(cost[name] for name in FIGURES))


if __name__ == "__main__":
    sys.exit(main())
