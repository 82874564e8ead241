"""Compares a 70B-shaped model on two GPUs, one stage each, with mlx-lm in one process on one GPU, in the same run.

Weights are random, because speed does not depend on them. Shapes and 4-bit quantization are those of Llama 3.3 70B.
Each round runs every measurement on both sides. Ratios are of medians. ``--shape small --cpu`` runs without a GPU.
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

from figures import Figure, options, print_figures
from loopback import WORKERS, start_cluster
from random_llama import SHAPES, write
from single_process import SingleProcess, prompt_ids
from throughput import batch_rate, first_token_s

from cluster.client import Client

PROMPT, USERS_PROMPT, LONG = 64, 16, 2048
USERS = (8, 16)
CONTEXT = 4096


def where_time_goes(client: Client, prompt: int, tokens: int, salt: int) -> list[dict[str, object]]:
    """Return each stage's compute, wait and wire time of one request, in milliseconds per token."""
    ids = [salt % 250, *prompt_ids(salt, prompt - 1)]
    answer = client.generate(ids, max_tokens=tokens, ignore_eos=True)
    return [
        {
            "worker": s.worker,
            "compute_ms": round(s.compute_ms / tokens, 2),
            "wire_ms": round(s.wire_ms / tokens, 2),
            "wait_ms": round(s.wait_ms / tokens, 2),
        }
        for s in answer.stages
    ]


def decode_rate(client: Client, prompt: int, tokens: int, salt: int) -> float:
    """Return one user's tokens per second, from the first token on."""
    ids = [salt % 250, *prompt_ids(0, prompt - 1)]
    arrivals = []
    with client.stream(ids, max_tokens=tokens + 1, ignore_eos=True) as stream:
        for _ in stream:
            arrivals.append(time.perf_counter())
    return tokens / (arrivals[-1] - arrivals[0])


def measure(client: Client, single: SingleProcess, asked: Namespace) -> list[Figure]:
    found: dict[str, list[float]] = {}
    long = min(LONG, asked.context // 2)
    for salt in range(1, 1 + asked.rounds):
        row = {"decode1": decode_rate(client, PROMPT, asked.tokens, salt)}
        row["single_decode1"] = asked.tokens / single.decode(PROMPT, asked.tokens)
        for users in USERS:
            row[f"decode{users}"] = batch_rate(
                client.address, users, USERS_PROMPT, asked.tokens, 100 * salt, asked.context
            )
            row[f"single_decode{users}"] = users * asked.tokens / single.batch(users, USERS_PROMPT, asked.tokens)
        row["ttft"] = first_token_s(client, long, salt)
        row["single_ttft"] = single.prefill(long)
        for name, value in row.items():
            found.setdefault(name, []).append(value)
        print(f"round {salt}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), file=sys.stderr, flush=True)
    return [Figure(name, "s" if "ttft" in name else "tokens/s", values) for name, values in found.items()]


def first_difference(client: Client, single: SingleProcess, tokens: int) -> dict[str, object]:
    """Return where greedy tokens differ from one process's, and how far apart its two best logits were there."""
    ids = prompt_ids(0, PROMPT)
    theirs = single.greedy(PROMPT, tokens)
    ours = client.generate(ids, max_tokens=tokens, ignore_eos=True).tokens
    for i, (token, (other, gap)) in enumerate(zip(ours, theirs, strict=True)):
        if token != other:
            return {"position": i, "logit_gap": round(gap, 5), "compared": tokens}
    return {"position": None, "logit_gap": None, "compared": tokens}


def memory(client: Client) -> list[dict[str, float]]:
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
    if asked.cpu:
        return [{}] * len(WORKERS)
    return [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(len(WORKERS))]


def run(asked: Namespace, stack: ExitStack) -> tuple[list[Figure], dict[str, object]]:
    folder = Path(asked.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-llama-")))
    began = time.perf_counter()
    model = write(folder / "model", SHAPES[asked.shape])
    wrote = time.perf_counter() - began
    print(f"wrote the checkpoint in {wrote:.0f} s", file=sys.stderr, flush=True)
    environments = devices(asked)
    single = SingleProcess(model, core=None, environment=environments[0])
    stack.callback(single.close)
    began = time.perf_counter()
    client = start_cluster(stack, model, "--max-context", str(asked.context), environments=environments)
    loaded = time.perf_counter() - began
    print(f"serving after {loaded:.0f} s", file=sys.stderr, flush=True)
    single.greedy(PROMPT, 1)
    difference = first_difference(client, single, asked.tokens)
    figures = measure(client, single, asked)
    long = min(LONG, asked.context // 2)
    stages = {"decode1": where_time_goes(client, 2, 2 * asked.tokens, 91), "ttft": where_time_goes(client, long, 1, 92)}
    slices = sum(s.weight_bytes for s in client.cluster().stages)
    return figures, {
        "shape": asked.shape,
        "write_s": round(wrote, 1),
        "serve_s": round(loaded, 1),
        "slice_bytes": slices,
        "stages": stages,
        "memory": memory(client),
        "first_difference": difference,
    }


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--folder", help="keep the checkpoint here; else in a temporary folder")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["MACPIPE_DEVICE"] = "cpu"
    with ExitStack() as stack:
        figures, facts = run(asked, stack)
    m = {f.name: f.median for f in figures}
    ratios = {f"decode{n}_over_single": m[f"decode{n}"] / m[f"single_decode{n}"] for n in (1, *USERS)}
    ratios["ttft_over_single"] = m["ttft"] / m["single_ttft"]
    ratios["memory_over_slice"] = max(row["peak_over_slice"] for row in facts["memory"])
    print_figures("medians", figures, ratios, asked.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
