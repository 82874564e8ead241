"""What a hop costs: a near-null model (64 wide, 2 layers) over two daemons on loopback, beside what bounds it.

Four figures, interleaved in one run: mlx-lm in one process, macpipe over two daemons (as the client sees it, streaming
and all), a bare gRPC ring of the same messages, and the same over raw sockets. Milliseconds of wall time a token.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
from bare_rings import WIDTH, GrpcRing, SocketRing
from figures import Figure, options, print_figures
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model

from cluster.cli.fleet import Fleet
from cluster.client import Client
from cluster.errors import MacpipeError
from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer

PROMPT = [1, 2, 3, 4]


def make_null_model(folder: Path) -> None:
    """Random fp32 weights; the tokenizer is the one that comes along, which is enough for token ids."""
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": load_tokenizer(resolve_model("faq")).vocab_size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve_model("faq") / name).read_bytes())


def start_cluster(stack: ExitStack, model: Path, folder: Path) -> Client:
    """Two workers and a coordinator as processes; a client of it."""
    fleet = stack.enter_context(Fleet(folder))
    cluster = f"bench-{folder.name}"
    for name in ("a", "b"):
        fleet.start(name, ["worker", "--name", name, "--cluster", cluster, "--home", str(folder)])
    fleet.start(
        "serve", ["serve", str(model), "--workers", "2", "--cluster", cluster, "--port", "7791", "--wait", "90"]
    )
    client = stack.enter_context(Client("127.0.0.1:7791", timeout_s=120))
    while True:
        fleet.check()
        try:
            if client.cluster().state == "serving":
                return client
        except MacpipeError:
            pass
        time.sleep(0.1)


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
    """Every run in turn, round by round, after a short one to warm up."""
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
        model = folder / "null"
        model.mkdir()
        make_null_model(model)
        client = start_cluster(stack, model, folder)
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
