"""Measures a hop: a tiny model (64 wide, 2 layers) over two daemons on loopback, and its lower bounds.

Four figures, interleaved in one run, in milliseconds per token: mlx-lm in one process, macpipe over two daemons as its
client sees it, a bare gRPC ring with the same messages, and the same ring over raw sockets.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
from bare_rings import WIDTH, GrpcRing, SocketRing
from figures import Figure, options, print_figures
from loopback import make_llama, start_cluster
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from cluster.client import Client

PROMPT = [1, 2, 3, 4]


def macpipe_run(client: Client) -> Callable[[int], float]:
    def run(tokens: int) -> float:
        stream = client.stream(PROMPT, max_tokens=tokens + 1, ignore_eos=True)
        arrivals = [time.perf_counter() for _ in stream]
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)

    return run


def mlx_lm_run(model_folder: Path) -> Callable[[int], float]:
    model, _ = load_model(model_folder)

    def run(tokens: int) -> float:
        arrivals = [time.perf_counter() for _ in generate_step(mx.array(PROMPT), model, max_tokens=tokens + 1)]
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)

    return run


def ring_run(step: Callable[[], None]) -> Callable[[int], float]:
    def run(tokens: int) -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            step()
        return (time.perf_counter() - began) / tokens

    return run


def measure(runs: dict[str, Callable[[int], float]], tokens: int, rounds: int) -> list[Figure]:
    """Run everything once per round, after a short warm-up."""
    for run in runs.values():
        run(20)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run(tokens) * 1e3)
    return [Figure(name, "ms a token", values) for name, values in found.items()]


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-hop-")))
        model = make_llama(folder / "null", hidden=WIDTH, intermediate=WIDTH, layers=2, heads=2, context=4096)
        client = start_cluster(stack, model)
        grpc_ring, sockets = GrpcRing(), SocketRing()
        stack.callback(grpc_ring.close)
        stack.callback(sockets.close)
        runs = {
            "mlx_lm": mlx_lm_run(model),
            "macpipe": macpipe_run(client),
            "grpc_ring": ring_run(grpc_ring.step),
            "sockets": ring_run(sockets.step),
        }
        figures = measure(runs, asked.tokens, asked.rounds)
    ms = {f.name: f.median for f in figures}
    ratios = {
        "added_ms_per_hop": (ms["macpipe"] - ms["mlx_lm"]) / 3,
        "macpipe_over_grpc_ring": ms["macpipe"] / ms["grpc_ring"],
    }
    print_figures("ms_per_token", figures, ratios, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
