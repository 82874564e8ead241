"""Compares a 70B-shaped model on several GPUs, one stage each, with mlx-lm in one process on one GPU, in the same run.

Weights are random, because speed does not depend on them. Shapes and 4-bit quantization are those of Llama 3.3 70B.
Each round runs every measurement on both sides (``pipeline_rounds``). Ratios are of medians. One user is also measured
with guesses, of which a set share is right (``replay_coordinator``). Beside the figures stands what a simulation of the
pipeline gives with the stages' measured times (``simulated_ring``). ``--shape small --cpu`` runs without a GPU.

Figures are in ``--record FILE`` as soon as they are measured, so that a run which fails or is stopped loses none.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from figures import options
from loopback import start_cluster
from pipeline_rounds import PROMPT, RATES, Pair, Sizes, rate_name
from random_llama import SHAPES, write
from record import Record
from simulated_ring import StageCosts, fit_prompt, formula, simulate_one_user, simulate_prompt, simulate_users
from single_process import SingleProcess, prompt_ids

from cluster.client import Client

REPLAY = Path(__file__).with_name("replay_coordinator.py")
STOP_ROOM = 64
"""Tokens of the context that are left for an answer to the longest prompt."""


def first_difference(client: Client, single: SingleProcess, tokens: int) -> dict[str, object]:
    """Return where greedy tokens differ from one process's, and how far apart its two best logits were there."""
    ids, theirs = prompt_ids(0, PROMPT), single.greedy(PROMPT, tokens)
    ours = client.generate(ids, max_tokens=tokens, ignore_eos=True).tokens
    for i, (token, (other, gap)) in enumerate(zip(ours, theirs, strict=True)):
        if token != other:
            return {"position": i, "logit_gap": round(gap, 5), "compared": tokens}
    return {"position": None, "logit_gap": None, "compared": tokens}


def memory(client: Client) -> list[dict[str, object]]:
    """Return the peak memory of each worker's GPU, with the sizes of its slice and kept caches."""
    state = client.cluster()
    peaks = {w.name: w.memory_peak for w in state.workers}
    return [
        {
            "worker": s.worker,
            "layers": [s.layers.start, s.layers.end],
            "slice": s.weight_bytes,
            "kept_prefixes": s.prefix_bytes,
            "peak": peaks[s.worker],
            "peak_over_slice": round(peaks[s.worker] / (s.weight_bytes + s.prefix_bytes), 4),
        }
        for s in state.stages
    ]


def devices(asked: Namespace) -> list[Mapping[str, str]]:
    """Return each worker's environment: its own GPU, or nothing."""
    return [{} if asked.cpu else {"CUDA_VISIBLE_DEVICES": str(i)} for i in range(asked.stages)]


def over_single(m: Mapping[str, float]) -> dict[str, float]:
    """Return the ratios to one process of all medians that both sides have."""
    found = {f"{name}_over_single": m[name] / m[f"single_{name}"] for name in m if f"single_{name}" in m}
    if "single_decode1" in m:
        guessed = (name for name in map(rate_name, RATES) if name in m)
        found |= {f"{name}_over_single": m[name] / m["single_decode1"] for name in guessed}
    return found


def start(asked: Namespace, stack: ExitStack, record: Record) -> Pair:
    """Write the checkpoint unless its folder has it, and start both sides."""
    folder = Path(asked.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-llama-")))
    model, began = folder / "model", time.perf_counter()
    if not (model / "config.json").exists():
        write(model, SHAPES[asked.shape])
        record.facts["write_s"] = round(time.perf_counter() - began, 1)
        print(f"wrote the checkpoint in {record.facts['write_s']} s", file=sys.stderr, flush=True)
    environments, began = devices(asked), time.perf_counter()
    single = SingleProcess(model, core=None, environment=environments[0])
    stack.callback(single.close)
    record.log = folder / "serve.log"
    client = start_cluster(
        stack,
        model,
        *("--max-context", str(asked.context)),
        *(("--prefill-chunk", str(asked.prefill_chunk)) if asked.prefill_chunk else ()),
        environments=environments,
        coordinator=REPLAY,
        worker_options=["--memory-limit", asked.memory_limit] if asked.memory_limit else (),
    )
    single.greedy(PROMPT, 1)
    record.facts["serve_s"] = round(time.perf_counter() - began, 1)
    print(f"both sides serve after {record.facts['serve_s']} s", file=sys.stderr, flush=True)
    record.facts["slice_bytes"] = sum(s.weight_bytes for s in client.cluster().stages)
    record.facts["first_difference"] = first_difference(client, single, asked.tokens)
    lengths = [length for length in asked.lengths if length + STOP_ROOM <= asked.context]
    return Pair(client, single, Sizes(asked.tokens, asked.users_tokens, asked.users, lengths, asked.context))


def measure(asked: Namespace, stack: ExitStack, record: Record) -> None:
    """Run all rounds, then say where the time goes, and simulate the same."""
    pair = start(asked, stack, record)
    rounds = record.rounds
    record.facts |= {"right_share": pair.one.guessed, "prompts": pair.prompts, "left_out": rounds.left_out}
    rounds.play(pair.first_tokens_before(), asked.rounds)
    rounds.play(pair.all(), 1)
    stages = record.facts["stages"] = pair.stages()
    note_recoveries(pair.client, record)
    record.keep()
    rounds.play(pair.all(), asked.rounds, first=2)
    record.facts["tokens_differ"] = pair.one.differ
    note_recoveries(pair.client, record)
    record.facts["memory"] = memory(pair.client)
    record.facts["simulated"] = simulate(pair, asked.rounds, stages)
    record.keep()


def note_recoveries(client: Client, record: Record) -> None:
    """Note how often the coordinator has recovered, and why."""
    record.facts["recoveries"] = recoveries = client.cluster().recoveries
    if recoveries:
        record.keep_log()


def simulate(pair: Pair, rounds: int, stages: Mapping[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return what a pipeline of stages with the measured times does, and what the formula says, by figure."""
    one, sizes = stages["decode1"], pair.sizes
    rows = {1: [stage["compute_ms"] for stage in one]}
    for users in sizes.users:
        rows.setdefault(max(users // len(one), 1), [stage["compute_ms"] for stage in stages[f"decode{users}"]])
    hop_ms = sum(stage["wire_ms"] for stage in one) / (len(one) + 1)
    costs = StageCosts(rows, [0.0] * len(one), hop_ms)
    found = simulate_one_user(costs, sizes.tokens, rounds)
    found |= {f"decode{users}": simulate_users(costs, users, sizes.users_tokens) for users in sizes.users}
    for length in sizes.lengths:
        taken = pair.prompts.get(f"ttft_{length}")
        if taken:  # else there was no time for it
            fitted = fit_prompt(costs, length, [stage["compute_ms"] for stage in taken[-1]])
            found[f"ttft_{length}"] = simulate_prompt(fitted, length)
    found |= {f"formula_{rate_name(rate)}": formula(costs, rate) for rate in RATES}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    parser.add_argument("--stages", type=int, default=2, help="workers, each with a GPU of its own")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no measurement that would end later")
    parser.add_argument("--tokens", type=int, default=64, help="of one user's answer")
    parser.add_argument("--users-tokens", type=int, default=16, help="of each of several users' answers")
    parser.add_argument("--users", type=int, nargs="+", default=[8, 16, 32], help="how many at once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="of prompts")
    parser.add_argument("--context", type=int, default=33024, help="longer prompts are left out")
    parser.add_argument("--prefill-chunk", type=int, help="tokens per chunk of a prompt; else by measured cost")
    parser.add_argument("--memory-limit", help="of each worker, like 24GiB: one GPU holds the other side's model too")
    parser.add_argument("--folder", help="keep the checkpoint here; else in a temporary folder")
    parser.add_argument("--record", type=Path, help="write the figures to this file as they come")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["MACPIPE_DEVICE"] = "cpu"
    record = Record(asked.record, asked.seconds, over_single, {"shape": asked.shape, "stages_asked": asked.stages})
    return record.fill(lambda stack: measure(asked, stack, record), as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
