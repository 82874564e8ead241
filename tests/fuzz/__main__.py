"""``ops/fuzz``: run one or all targets on mutated inputs from a seed; exit with 1 if there are findings.

Findings are written to ``--keep``. A fixed finding belongs into ``tests/fuzz/corpus``, under its target.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fuzz.run import Finding, Ran, pack, run, unpack
from fuzz.targets import TARGETS

INPUTS = 2_000_000
FLAT_BYTES = 32 << 20
"""By this much a target's memory may have grown between a tenth of its inputs and the end: caches that fill."""


def main() -> int:
    options = _options()
    chosen = [TARGETS[name] for name in options.target or TARGETS]
    whole, ran, began = sum(target.share for target in chosen), [], time.monotonic()
    for target in chosen:
        count = max(1, round(options.inputs * target.share / whole))
        print(f"{target.name}: {count} inputs", file=sys.stderr, flush=True)
        ran.append(_in_a_child(target.name, count, options.seed))
        _keep(ran[-1], options.keep)
    facts = _facts(ran, options.seed, time.monotonic() - began)
    print(json.dumps(facts) if options.json else "\n".join(_table(ran, facts)))
    return 1 if facts["findings"] or not facts["flat"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops/fuzz", description=__doc__)
    parser.add_argument(
        "--inputs", type=int, default=INPUTS, metavar="N", help=f"how many in all; {INPUTS:,} by default"
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), metavar="T", help=f"one of {', '.join(TARGETS)}"
    )
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**32), help="repeat the randomness of an earlier run"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    return parser.parse_args()


def _in_a_child(target: str, count: int, seed: int) -> Ran:
    """Run it in a child process: its memory is measured alone, and a library that crashes is a finding."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "wb") as out:
            out.write(pack(run(TARGETS[target], count, seed)))
        atexit._run_exitfuncs()  # scratch folders
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        said = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not said:
        return Ran(target, findings={"": Finding(f"the process ended with {code}", "in a library", b"")})
    return unpack(said)


def _keep(ran: Ran, folder: Path) -> None:
    for finding in ran.findings.values():
        print(f"{ran.target}: {finding.error} at {finding.where}, {finding.times} times", file=sys.stderr, flush=True)
        (folder / ran.target).mkdir(parents=True, exist_ok=True)
        (folder / ran.target / hashlib.sha256(finding.data).hexdigest()[:16]).write_bytes(finding.data)


def _facts(ran: Sequence[Ran], seed: int, seconds: float) -> dict[str, Any]:
    return {
        "inputs": sum(one.inputs for one in ran),
        "seed": seed,
        "seconds": round(seconds),
        "findings": sum(len(one.findings) for one in ran),
        "flat": all(one.memory_end - one.memory_tenth <= FLAT_BYTES for one in ran),
        "targets": [
            {
                "target": one.target,
                "inputs": one.inputs,
                "taken": one.taken,
                "seconds": round(one.seconds, 1),
                "slowest_ms": round(one.slowest_s * 1e3, 1),
                "memory_tenth_mib": round(one.memory_tenth / 2**20, 1),
                "memory_end_mib": round(one.memory_end / 2**20, 1),
                "findings": [f"{f.error} at {f.where}" for f in one.findings.values()],
            }
            for one in ran
        ],
    }


def _table(ran: Iterable[Ran], facts: dict[str, Any]) -> Iterable[str]:
    yield f"{'target':30} {'inputs':>9} {'taken':>9} {'slowest':>10} {'memory at 10 % and end':>24} {'findings':>9}"
    for one in ran:
        memory = f"{one.memory_tenth / 2**20:.1f} -> {one.memory_end / 2**20:.1f} MiB"
        found = len(one.findings)
        yield f"{one.target:30} {one.inputs:>9} {one.taken:>9} {one.slowest_s * 1e3:>7.1f} ms {memory:>24} {found:>9}"
    flat = "flat" if facts["flat"] else "NOT flat"
    what = f"{facts['inputs']:,} inputs in {facts['seconds']} s from seed {facts['seed']}"
    yield f"{what}; {facts['findings']} findings; memory {flat}"


if __name__ == "__main__":
    if "--cost" in sys.argv:
        from fuzz.cost.__main__ import main as search_costs

        sys.argv.remove("--cost")
        sys.exit(search_costs())
    sys.exit(main())
