"""Plans large models for assumed Macs, from headers alone, and measures how long a plan takes.

It makes 4-bit checkpoints of the shapes of Llama-3.3-70B and Qwen3-235B-A22B without weights (sparse files), prints
`macpipe plan` for three sets of Macs, and times the search over 16 workers and 128 layers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, options, print_figures
from shapes import CONFIGS, make_headers

from cluster.core.limits import GIB
from cluster.core.plan import ModelRef, ModelShape, Objective, Profile
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.memory_split import WorkerMemory
from cluster.placement.propose import PlanRequest, propose

MACS = ("m2-ultra-192x2", "m4-pro-48x4", "m3-max-64,m2-max-96,m4-pro-24")


def print_plans(folder: Path, objective: str) -> None:
    for name in CONFIGS:
        model = make_headers(name, folder)
        for macs in MACS:
            print(f"\n$ macpipe plan {name} --assume {macs},10gbe --objective {objective}", flush=True)
            command = [sys.executable, "-m", "cluster", "plan", str(model), "--assume", f"{macs},10gbe"]
            subprocess.run([*command, "--objective", objective], check=False)


def search_s(workers: int, layers: int, alike: bool, objective: Objective) -> float:
    """Return the seconds that one plan takes, with its explanation."""
    shape = ModelShape(
        model=ModelRef("m", "", "f"),
        layers=layers,
        layer_bytes=(GIB // 2,) * layers,
        cache_bytes=(GIB // 100,) * layers,
        shared=(),
        clean_cuts=tuple(range(1, layers)),
        unclean=(),
        max_context=4096,
        flops=(2e9,) * layers,
        boundary_bytes=(16384,) * layers,
    )
    differ = 0 if alike else 1
    macs = [
        Candidate(
            WorkerMemory(f"w{i}", (20 + i * differ) * GIB), Profile(2e11 + 1e10 * i * differ, 1e-4, 1e-4, 1e13, 0.2)
        )
        for i in range(workers)
    ]
    began = time.perf_counter()
    propose(shape, Candidates(macs), PlanRequest(objective))
    return time.perf_counter() - began


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--objective", choices=[o.value for o in Objective], default=Objective.LATENCY.value)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    if not chosen.json:
        with tempfile.TemporaryDirectory() as folder:
            print_plans(Path(folder), chosen.objective)
        print("\nseconds of one plan for 128 layers:")
    cases = [(16, False), (16, True), (8, False)]
    figures = [
        Figure(
            f"{n} {'alike' if alike else 'different'}, {objective}",
            "s",
            [search_s(n, 128, alike, objective) for _ in range(chosen.rounds)],
        )
        for n, alike in cases
        for objective in Objective
    ]
    print_figures("plan_s", figures, {}, chosen.json)


if __name__ == "__main__":
    main()
